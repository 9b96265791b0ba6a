//! Follows the events of a job, over lines that break.

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use uuid::Uuid;

use super::client::Client;
use super::{show, verdict};

/// Follows a job to its end and tells how that was.
pub fn watch(client: &Client, id: Uuid, json: bool) -> anyhow::Result<ExitCode> {
    let mut shown = Shown { bar: None, bars: !json && std::io::stderr().is_terminal(), json };
    stream(client, id, |name, data| shown.take(name, data))?;
    shown.clear();
    let job = client.get(&format!("/v1/jobs/{id}"))?;
    if !json {
        super::super::print(&show::job(&job));
    }
    Ok(verdict(job["state"].as_str().unwrap_or_default()))
}

/// Shows what happened so far, and with `follow` what is still to come.
pub fn logs(client: &Client, id: Uuid, follow: bool, json: bool) -> anyhow::Result<ExitCode> {
    if follow {
        stream(client, id, |name, data| {
            if name != "progress" {
                say(data, json);
            }
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut after = 0;
    loop {
        let page = client.get(&format!("/v1/jobs/{id}/events?limit=1000&after={after}"))?;
        for event in page["data"].as_array().into_iter().flatten() {
            after = event["seq"].as_i64().unwrap_or(after);
            say(event, json);
        }
        if page["has_more"] != true {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn say(event: &Value, json: bool) {
    let line = if json { Some(event.to_string()) } else { show::event(event) };
    if let Some(line) = line {
        // Nobody need read to the end.
        writeln!(std::io::stdout(), "{line}").ok();
    }
}

/// Tells every event of a job once, until its last one. A stream that breaks off is taken up where it was.
fn stream(client: &Client, id: Uuid, mut told: impl FnMut(&str, &Value)) -> anyhow::Result<()> {
    let mut last = "0".to_owned();
    loop {
        let headers = [("accept", "text/event-stream"), ("last-event-id", last.as_str())];
        let answer = client.open(&format!("/v1/jobs/{id}/events"), &headers)?;
        let mut lines = BufReader::new(answer.into_body().into_reader()).lines();
        let (mut name, mut data, mut seq) = (String::new(), String::new(), None);
        while let Some(Ok(line)) = lines.next() {
            match line.split_once(':').map(|(field, value)| (field, value.strip_prefix(' ').unwrap_or(value)))
            {
                Some(("event", value)) => value.clone_into(&mut name),
                Some(("data", value)) => data.push_str(value),
                Some(("id", value)) => seq = Some(value.to_owned()),
                // An empty line ends an event.
                None if line.is_empty() && !data.is_empty() => {
                    if name == "end" {
                        return Ok(());
                    }
                    told(&name, &serde_json::from_str(&data).unwrap_or_default());
                    last = seq.take().unwrap_or(last);
                    name.clear();
                    data.clear();
                }
                Some(_) | None => {}
            }
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

struct Shown {
    bar: Option<ProgressBar>,
    bars: bool,
    json: bool,
}

impl Shown {
    fn take(&mut self, name: &str, data: &Value) {
        if self.json {
            writeln!(std::io::stdout(), "{data}").ok();
        } else if name == "progress" {
            self.advance(data);
        } else if let Some(line) = show::event(data) {
            match &self.bar {
                Some(bar) => bar.println(line),
                None => drop(writeln!(std::io::stderr(), "{line}")),
            }
            if data["event"] == "stage_finished" || data["event"] == "state_changed" {
                self.clear();
            }
        }
    }

    fn advance(&mut self, progress: &Value) {
        if !self.bars {
            return;
        }
        let word = |name: &str| progress[name].as_str().unwrap_or_default();
        let number = |name: &str| progress[name].as_u64().unwrap_or_default();
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{prefix:>8}  {bar:30} {pos}/{len} {msg}");
            ProgressBar::new(0).with_style(style.expect("the template is right. This is a bug."))
        });
        bar.set_prefix(word("stage").to_owned());
        bar.set_length(number("total"));
        bar.set_position(number("done"));
        let left =
            progress["eta_s"].as_u64().map_or(String::new(), |s| format!(", {s} s left in this stage"));
        bar.set_message(format!("{} ({}{left})", word("unit"), word("task")));
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
