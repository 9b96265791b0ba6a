//! The frame of a plot, its axes and its look: no script, no font, no file from elsewhere.

use std::fmt::Write;

use super::html::escape;

pub const WIDTH: f64 = 720.0;
pub const LEFT: f64 = 64.0;
pub const RIGHT: f64 = 16.0;
pub const TOP: f64 = 14.0;
pub const BOTTOM: f64 = 44.0;

/// The frame of a plot and where numbers lie in it.
pub struct Plot {
    height: f64,
    /// Free space on the right, for what stands beside the plot.
    right: f64,
    x: (f64, f64),
    y: (f64, f64),
    body: String,
}

impl Plot {
    pub fn new(height: f64, x: (f64, f64), y: (f64, f64)) -> Self {
        let widen = |(low, high): (f64, f64)| if high > low { (low, high) } else { (low - 0.5, low + 0.5) };
        Self { height, right: RIGHT, x: widen(x), y: widen(y), body: String::new() }
    }

    /// Leaves so much space on the right.
    pub fn beside(mut self, right: f64) -> Self {
        self.right = right;
        self
    }

    pub fn px(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - self.right)
    }

    pub fn py(&self, y: f64) -> f64 {
        self.height - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (self.height - TOP - BOTTOM)
    }

    pub fn add(&mut self, piece: &str) {
        self.body.push_str(piece);
    }

    pub fn points(&self, points: impl Iterator<Item = (f64, f64)>) -> String {
        points.fold(String::new(), |mut out, (x, y)| {
            write!(out, "{:.1},{:.1} ", self.px(x), self.py(y)).expect("writing to a text. This is a bug.");
            out
        })
    }

    pub fn line(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        let points = self.points(points);
        self.add(&format!("<polyline class='{class}' points='{}'/>", points.trim_end()));
    }

    /// A line between two points of the picture, wherever the numbers lie.
    pub fn line_at(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.add(&format!("<polyline class='{class}' points='{x1:.1},{y1:.1} {x2:.1},{y2:.1}'/>"));
    }

    /// From `low` to `high` at `x`, with a bar across either end.
    pub fn error_bar(&mut self, x: f64, low: f64, high: f64) {
        let (x, low, high) = (self.px(x), self.py(low), self.py(high));
        let (left, right) = (x - 3.0, x + 3.0);
        self.add(&format!(
            "<path class='error' d='M{left:.1} {high:.1}H{right:.1}M{x:.1} {high:.1}V{low:.1}M{left:.1} {low:.1}H{right:.1}'/>"
        ));
    }

    /// Round numbers along both axes.
    pub fn axes(&mut self, x_label: &str, y_label: &str) {
        let text = |ticks: Vec<f64>| ticks.into_iter().map(|t| (t, tick_text(t))).collect::<Vec<_>>();
        self.axes_at(&text(ticks(self.x)), &text(ticks(self.y)), x_label, y_label);
    }

    /// Ticks where they are told, with their texts.
    pub fn axes_at(
        &mut self,
        x_ticks: &[(f64, String)],
        y_ticks: &[(f64, String)],
        x_label: &str,
        y_label: &str,
    ) {
        let (bottom, right) = (self.height - BOTTOM, WIDTH - self.right);
        for (at, text) in y_ticks {
            let y = self.py(*at);
            self.add(&format!(
                "<line class='grid' x1='{LEFT}' x2='{right}' y1='{y:.1}' y2='{y:.1}'/>\
                 <text class='end' x='{:.1}' y='{:.1}'>{text}</text>",
                LEFT - 8.0,
                y + 4.0
            ));
        }
        for (at, text) in x_ticks {
            let x = self.px(*at);
            self.add(&format!("<text class='mid' x='{x:.1}' y='{:.1}'>{text}</text>", bottom + 18.0));
        }
        self.labels(x_label, y_label);
    }

    pub fn labels(&mut self, x_label: &str, y_label: &str) {
        let (middle, bottom) = (f64::midpoint(LEFT, WIDTH - self.right), self.height - 6.0);
        let half = f64::midpoint(TOP, self.height - BOTTOM);
        self.add(&format!(
            "<text class='mid' x='{middle}' y='{bottom}'>{}</text>\
             <text class='mid' transform='translate(14 {half}) rotate(-90)'>{}</text>",
            escape(x_label),
            escape(y_label)
        ));
    }

    pub fn figure(self, id: &'static str, title: &str) -> Figure {
        Figure { id, title: title.to_owned(), height: self.height, body: self.body }
    }
}

/// A finished plot.
pub struct Figure {
    pub id: &'static str,
    title: String,
    height: f64,
    body: String,
}

impl Figure {
    /// `below` under `above`.
    pub fn stacked(above: Plot, below: Plot, id: &'static str, title: &str) -> Self {
        let height = above.height + below.height;
        let body = format!("{}<g transform='translate(0 {})'>{}</g>", above.body, above.height, below.body);
        Self { id, title: title.to_owned(), height, body }
    }

    /// Inside a page, whose style it takes.
    pub fn inline(&self) -> String {
        format!(
            "<svg role='img' aria-labelledby='{0}' viewBox='0 0 {WIDTH} {1}'><title id='{0}'>{2}</title>{3}</svg>",
            self.id,
            self.height,
            escape(&self.title),
            self.body
        )
    }

    /// As a file of its own: its title to be seen, on white.
    pub fn file(&self) -> String {
        let style = LIGHT
            .iter()
            .fold(STYLE.to_owned(), |style, (name, colour)| style.replace(&format!("var(--{name})"), colour));
        let (title, height) = (escape(&self.title), self.height + HEADING);
        format!(
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'>\
             <title>{title}</title><style>{style}\nsvg text{{font-family:sans-serif}}</style>\
             <rect width='100%' height='100%' fill='white'/><text class='heading' x='{RIGHT}' y='22'>{title}</text>\
             <g transform='translate(0 {HEADING})'>{}</g></svg>\n",
            self.body
        )
    }
}

/// Space above a plot for its title, where it stands alone.
const HEADING: f64 = 34.0;

/// The colours of the page by day; a file of its own has no page to take them from.
pub const LIGHT: [(&str, &str); 7] = [
    ("ink", "#1c1d1f"),
    ("soft", "#63676d"),
    ("paper", "#fdfcf9"),
    ("rule", "#dfdcd4"),
    ("accent", "#9c3d1f"),
    ("leaf", "#2f6f4f"),
    ("wash", "#f4f1e9"),
];

/// How plots look, on the page and alone. Series differ in colour (Okabe and Ito's, for all eyes), dashes and marks.
pub const STYLE: &str = "
svg text{fill:var(--soft);font-size:13px}
svg text.heading{fill:var(--ink);font-size:15px;font-weight:600}
.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--rule)}
.band{fill:var(--leaf);opacity:.2}
.curve{fill:none;stroke:var(--leaf);stroke-width:2.2;stroke-linejoin:round}
.raw{fill:none;stroke:var(--soft);stroke-width:1;opacity:.55}
.mark{stroke:var(--accent);stroke-dasharray:4 4}
.bound{fill:none;stroke:#111;stroke-width:1.2;stroke-dasharray:5 4}
.dot{fill:var(--accent)}
.behind{fill:none;stroke:#111;stroke-width:5}
.chosen{fill:none;stroke:#ff5a4f;stroke-width:2.6}
.halo{fill:none;stroke:#fff;stroke-width:3;stroke-linejoin:round;opacity:.75}
.path{fill:none;stroke:#111;stroke-width:1.2;stroke-linejoin:round}
.least{fill:#111;stroke:#fff;stroke-width:1}
.needed{fill:var(--accent);stroke:var(--accent)}
.mixed{fill:#e69f00;fill-opacity:.55;stroke:#b57c00}
.redundant{fill:var(--paper);stroke:var(--leaf);stroke-width:1.6}
.gone{fill:var(--ink)}
.error{fill:none;stroke:var(--ink);stroke-width:1.1}
.series{fill:none;stroke-width:2.2;stroke-linejoin:round}
.leader{stroke:var(--soft);stroke-width:.7}
.c0{color:var(--ink)}.c1{color:#0072b2}.c2{color:#d55e00}.c3{color:#009e73}.c4{color:#cc79a7}.c5{color:#e69f00}.c6{color:#56b4e9}
.series,.sign{stroke:currentColor}.sign{fill:var(--paper);stroke-width:2}
.d1{stroke-dasharray:7 3}.d2{stroke-dasharray:2 3}.d3{stroke-dasharray:9 3 2 3}
";

/// Round numbers inside a range, about five of them.
pub fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    if high <= low {
        return vec![low];
    }
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

pub fn tick_text(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}
