//! Answers of the API, for people.

use serde_json::Value;

/// A job in a few lines.
pub fn job(job: &Value) -> String {
    let word = |name: &str| job[name].as_str().unwrap_or_default();
    let mut text = format!("{}  {}", word("id"), word("state"));
    if let Some(wish) = job["wish"].as_str() {
        text += &format!(" ({wish} asked for)");
    }
    if !word("name").is_empty() {
        text += &format!("  {}", word("name"));
    }
    text.push('\n');
    if let Some(ahead) = job["jobs_ahead"].as_u64() {
        text += &format!("  {ahead} jobs go before it\n");
    }
    for stage in job["stages"].as_array().into_iter().flatten() {
        let part = |name: &str| stage[name].as_str().unwrap_or_default();
        let took =
            stage["duration_ms"].as_f64().map_or(String::new(), |ms| format!("  {:.1} s", ms / 1000.0));
        let before = if stage["reused"] == true { "  as before" } else { "" };
        text += &format!("  {:>8}  {}{took}{before}\n", part("stage"), part("state"));
    }
    if let Some(progress) = job["progress"].as_object() {
        text += &format!(
            "  {} {}/{} {}\n",
            show(&progress["task"]),
            progress["done"],
            progress["total"],
            show(&progress["unit"])
        );
    }
    if let Some(message) = job["failure"]["message"].as_str() {
        text += &format!("  {}: {message}\n", show(&job["failure"]["kind"]));
    }
    text
}

/// A line for each job.
pub fn table(jobs: &[Value]) -> String {
    let line = |job: &Value| {
        let word = |name: &str| job[name].as_str().unwrap_or_default();
        let far = job["progress"]["fraction"]
            .as_f64()
            .map_or(String::new(), |f| format!("{} {:.0} %", show(&job["progress"]["stage"]), 100.0 * f));
        let created = word("created_at").get(..19).unwrap_or_default().replace('T', " ");
        format!("{}  {:<9}  {created}  {far:<14}  {}", word("id"), word("state"), word("name"))
            .trim_end()
            .to_owned()
            + "\n"
    };
    jobs.iter().map(line).collect()
}

/// A line for an event, if a person wants one: counts and single values are none.
pub fn event(event: &Value) -> Option<String> {
    let word = |name: &str| event[name].as_str().unwrap_or_default();
    let said = match word("event") {
        "stage_started" => format!("{:>8}  begins", word("stage")),
        "stage_finished" if event["reused"] == true => format!("{:>8}  done, as before", word("stage")),
        "stage_finished" => {
            format!(
                "{:>8}  done, {:.1} s",
                word("stage"),
                event["duration_ms"].as_f64().unwrap_or_default() / 1000.0
            )
        }
        "noted" => format!("{:>8}  {}", word("stage"), word("message")),
        "failed" => format!("{:>8}  {}", show(&event["failure"]["kind"]), show(&event["failure"]["message"])),
        "state_changed" => {
            let reason = event["reason"].as_str().map_or(String::new(), |r| format!(": {r}"));
            format!("{:>8}  {}{reason}", "job", word("state"))
        }
        "wish_noted" => format!("{:>8}  {} asked for", "job", word("wish")),
        _ => return None,
    };
    Some(format!("{}  {said}", word("at").get(11..19).unwrap_or_default()))
}

fn show(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
