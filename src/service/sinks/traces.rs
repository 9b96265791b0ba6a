//! OpenTelemetry: one trace for each job, from the request that asked for it through its attempts to their stages, by OTLP
//! over HTTP (protobuf), named as the semantic conventions for CI/CD pipelines have it.
//!
//! A span is made of the job's events when it has ended, and leaves through the outbox. So nothing of a trace is lost with
//! whoever did the work, and no job waits for a collector. Ids are computed from the job's id and the number of the event
//! that began the span: one that is sent twice is the same span.

use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};
use prost::Message as _;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use super::call::{Result, accepted, agent, beside};
use crate::job::progress::{Event, Stage};
use crate::job::state::JobState;
use crate::service::db::{Database, Entry, EventRow, JobEvent, JobRow, Message};

/// Of an answer.
const MOST_ANSWER_BYTES: u64 = 64 << 10;
/// Events that begin and end spans.
const KINDS: [&str; 4] = ["state_changed", "stage_started", "stage_finished", "failed"];
/// Of one job: more than any job has.
const MOST_EVENTS: u32 = 100_000;

/// A collector.
#[derive(Clone)]
pub struct Traces {
    url: String,
    headers: Vec<(String, String)>,
    timeout: Duration,
    resource: Vec<KeyValue>,
}

impl std::fmt::Debug for Traces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Traces({})", self.url)
    }
}

impl Traces {
    /// By the standard variables (`OTEL_EXPORTER_OTLP_…`), which `variable` looks up. `None` when no endpoint is set.
    ///
    /// # Errors
    /// A variable that asks for what cannot be done here.
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
    ) -> std::result::Result<Option<Self>, String> {
        let set = |name: &str| variable(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        // The one for traces goes before the one for all signals.
        let exporter = |what: &str| {
            let names = [format!("OTEL_EXPORTER_OTLP_TRACES_{what}"), format!("OTEL_EXPORTER_OTLP_{what}")];
            names.into_iter().find_map(|name| set(&name).map(|value| (name, value)))
        };
        let off = set("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"))
            || set("OTEL_TRACES_EXPORTER").is_some_and(|v| v == "none");
        let url = set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(|| {
            set("OTEL_EXPORTER_OTLP_ENDPOINT").map(|url| format!("{}/v1/traces", url.trim_end_matches('/')))
        });
        let Some(url) = url.filter(|_| !off) else { return Ok(None) };
        super::Reach::Private.check(&url).map_err(|e| format!("the OTLP endpoint {url} {e}"))?;
        for (what, possible) in [("PROTOCOL", "http/protobuf"), ("COMPRESSION", "none")] {
            if let Some((name, value)) = exporter(what).filter(|(_, value)| value != possible) {
                return Err(format!("{name} is {value}; only {possible} can be done here"));
            }
        }
        let timeout = match exporter("TIMEOUT") {
            Some((name, value)) => {
                let ms = value.parse().map_err(|_| format!("{name} is {value}; it must be milliseconds"))?;
                Duration::from_millis(ms)
            }
            None => Duration::from_secs(10),
        };
        let headers =
            exporter("HEADERS").map_or_else(|| Ok(Vec::new()), |(name, value)| pairs(&name, &value))?;
        let mut resource = match set("OTEL_RESOURCE_ATTRIBUTES") {
            Some(value) => pairs("OTEL_RESOURCE_ATTRIBUTES", &value)?,
            None => Vec::new(),
        };
        let named = |wanted: &str, all: &[(String, String)]| all.iter().any(|(name, _)| name == wanted);
        if let Some(name) = set("OTEL_SERVICE_NAME") {
            resource.retain(|(key, _)| key != "service.name");
            resource.push(("service.name".into(), name));
        } else if !named("service.name", &resource) {
            resource.push(("service.name".into(), "secateur".into()));
        }
        if !named("service.version", &resource) {
            resource.push(("service.version".into(), env!("CARGO_PKG_VERSION").into()));
        }
        let resource = resource.into_iter().map(|(key, value)| attribute(&key, value)).collect();
        Ok(Some(Self { url, headers, timeout, resource }))
    }

    /// Sends the spans that ended with the change of state which a message tells of. Gives the status of the answer, or
    /// `None` when there was nothing to send.
    pub async fn deliver(&self, database: &Database, message: &Message) -> Result<Option<u16>> {
        let Some(id) = message.job_id else { return Ok(None) };
        // A deleted job has nothing more to tell.
        let Some(job) = database.job(message.tenant, id).await? else { return Ok(None) };
        let body: serde_json::Value = serde_json::from_str(&message.body).map_err(|e| e.to_string())?;
        let until = body["data"]["seq"].as_i64().unwrap_or(i64::MAX);
        let kinds = KINDS.map(String::from);
        let mut events = database.events_after(message.tenant, id, 0, &kinds, MOST_EVENTS).await?;
        events.retain(|event| event.seq <= until);
        let spans = Trace::of(&job).ended(&events);
        if spans.is_empty() {
            return Ok(None);
        }
        let this = self.clone();
        beside(move || this.send(spans)).await.map(Some)
    }

    fn send(&self, spans: Vec<Span>) -> Result<u16> {
        let scope = InstrumentationScope {
            name: "secateur".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..InstrumentationScope::default()
        };
        let resource = Resource { attributes: self.resource.clone(), ..Resource::default() };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }];
        let of_us = ResourceSpans { resource: Some(resource), scope_spans, ..ResourceSpans::default() };
        let request = ExportTraceServiceRequest { resource_spans: vec![of_us] };
        let mut call = agent(self.timeout).post(&self.url).header("content-type", "application/x-protobuf");
        for (name, value) in &self.headers {
            call = call.header(name, value);
        }
        let mut answer = accepted("the collector", call.send(&request.encode_to_vec()))?;
        let told = answer.body_mut().with_config().limit(MOST_ANSWER_BYTES).read_to_vec().unwrap_or_default();
        // What a collector takes in part it does not want again.
        if let Ok(ExportTraceServiceResponse { partial_success: Some(part) }) =
            ExportTraceServiceResponse::decode(&told[..])
            && part.rejected_spans > 0
        {
            tracing::warn!(spans = part.rejected_spans, why = part.error_message, "spans were refused");
        }
        Ok(answer.status().as_u16())
    }
}

/// `key=value,key=value`, values percent-encoded.
fn pairs(name: &str, text: &str) -> std::result::Result<Vec<(String, String)>, String> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        let (key, value) = (key.trim(), decoded(value.trim())?);
        (!key.is_empty()).then(|| (key.to_owned(), value))
    };
    let parts = text.split(',').filter(|part| !part.trim().is_empty());
    // The value may be a secret: it is not repeated.
    parts.map(|part| pair(part).ok_or_else(|| format!("{name} must be key=value,key=value"))).collect()
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let hex = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?
            }
            plain => plain,
        });
    }
    String::from_utf8(bytes).ok()
}

/// A caller's span, by W3C Trace Context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    trace: [u8; 16],
    span: [u8; 8],
    sampled: bool,
}

impl Parent {
    /// Reads a `traceparent` header; `None` when it is none.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let plain = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let mut parts = text.split('-');
        let [version, trace, span, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?]
            .map(|part| Some(part).filter(|p| plain(p)));
        let (version, flags) = (version?, flags?);
        // Later versions may say more behind these.
        let whole = version != "ff" && version.len() == 2 && (version != "00" || parts.next().is_none());
        let mut read = Self { trace: [0; 16], span: [0; 8], sampled: false };
        hex::decode_to_slice(trace?, &mut read.trace).ok()?;
        hex::decode_to_slice(span?, &mut read.span).ok()?;
        read.sampled = flags.len() == 2 && u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        (whole && flags.len() == 2 && read.trace != [0; 16] && read.span != [0; 8]).then_some(read)
    }
}

/// A job as a trace.
struct Trace<'a> {
    job: &'a JobRow,
    parent: Option<Parent>,
}

impl<'a> Trace<'a> {
    fn of(job: &'a JobRow) -> Self {
        Self { job, parent: job.asked.traceparent.as_deref().and_then(Parent::read) }
    }

    /// The spans that ended with the last of these events, a change of the job's state.
    fn ended(&self, events: &[EventRow]) -> Vec<Span> {
        if self.parent.is_some_and(|parent| !parent.sampled) {
            return Vec::new();
        }
        let changes: Vec<(usize, JobState)> = events.iter().enumerate().filter_map(change).collect();
        let Some(&(last, state)) = changes.last() else { return Vec::new() };
        let mut spans = Vec::new();
        match changes.len().checked_sub(2).map(|before| changes[before]) {
            None => spans.extend(self.request(&events[last])),
            Some((began, JobState::Running)) => self.attempt(&events[began..=last], state, &mut spans),
            Some(_) => {}
        }
        if state.is_terminal() {
            spans.push(self.whole(&events[changes[0].0], &events[last], state));
        }
        spans
    }

    /// The request that asked for the job and nothing else.
    fn request(&self, queued: &EventRow) -> Option<Span> {
        let begun = self.job.asked.at?;
        let route = if self.job.retry_of.is_some() { "/v1/jobs/{id}/retry" } else { "/v1/jobs" };
        let attributes = vec![
            attribute("http.request.method", "POST".into()),
            attribute("http.route", route.into()),
            number("http.response.status_code", 201),
        ];
        let parent = self.parent.map(|parent| parent.span.to_vec()).unwrap_or_default();
        let span = self.span("request", 0, parent, format!("POST {route}"), (begun, queued.at));
        Some(Span { kind: SpanKind::Server.into(), attributes, ..span })
    }

    fn whole(&self, queued: &EventRow, ended: &EventRow, state: JobState) -> Span {
        let mut attributes = vec![
            attribute("cicd.pipeline.action.name", "RUN".into()),
            attribute("cicd.pipeline.name", "secateur".into()),
            attribute("cicd.pipeline.run.id", self.job.id.to_string()),
            attribute("cicd.pipeline.result", result(state).into()),
            attribute("secateur.job.title", self.job.spec.title()),
        ];
        let labels = &self.job.labels;
        attributes.extend(
            labels.iter().map(|(key, value)| attribute(&format!("secateur.label.{key}"), value.clone())),
        );
        let parent = match (self.job.asked.at, self.parent) {
            (Some(_), _) => self.id("request", 0),
            (None, Some(parent)) => parent.span.to_vec(),
            (None, None) => Vec::new(),
        };
        let failure = self.job.failure.as_ref().filter(|_| state == JobState::Failed);
        let status = failure.map(|failure| failed(failure.message.clone()));
        let span = self.span("job", 0, parent, "RUN secateur".into(), (queued.at, ended.at));
        Span { kind: SpanKind::Server.into(), attributes, status, ..span }
    }

    /// An attempt and its stages: from a change to `running` to the change after it.
    fn attempt(&self, events: &[EventRow], state: JobState, spans: &mut Vec<Span>) {
        let [began, inside @ .., ended] = events else { return };
        let failure = inside.iter().find_map(|event| match &event.body {
            Entry::Run(Event::Failed { failure }) => Some(failure),
            Entry::Run(_) | Entry::Job(_) => None,
        });
        let reason = match &ended.body {
            Entry::Job(JobEvent::StateChanged { reason, .. }) => reason.clone(),
            Entry::Job(_) | Entry::Run(_) => None,
        };
        let outcome = match state {
            // It does not count: it was paused, or its worker left in order.
            JobState::Queued | JobState::Paused if ended.attempt < began.attempt => "cancellation",
            JobState::Queued if failure.is_some() => "failure",
            JobState::Queued => "error",
            other => result(other),
        };
        let status = matches!(outcome, "failure" | "error").then(|| failed(reason.unwrap_or_default()));
        let attributes = vec![
            attribute("cicd.pipeline.task.name", "attempt".into()),
            attribute("cicd.pipeline.task.run.id", format!("{}/{}", self.job.id, began.seq)),
            attribute("cicd.pipeline.task.run.result", outcome.into()),
            number("secateur.attempt", i64::from(began.attempt)),
        ];
        let id = self.id("attempt", began.seq);
        let name = format!("attempt {}", began.attempt);
        let span = self.span("attempt", began.seq, self.id("job", 0), name, (began.at, ended.at));
        spans.push(Span { attributes, status, ..span });
        let mut open: Vec<(Stage, &EventRow)> = Vec::new();
        for event in inside {
            match &event.body {
                Entry::Run(Event::StageStarted { stage }) => open.push((*stage, event)),
                Entry::Run(Event::StageFinished { stage, reused, duration_ms, .. }) => {
                    let Some(at) = open.iter().rposition(|(s, _)| s == stage) else { continue };
                    let (_, start) = open.remove(at);
                    // The run's own clock: while the database was away, both events waited for it.
                    let begun = (event.at - Duration::from_millis(*duration_ms)).max(began.at);
                    spans.push(self.stage(*stage, start.seq, &id, (begun, event.at), "success", *reused));
                }
                Entry::Run(_) | Entry::Job(_) => {}
            }
        }
        for (stage, start) in open {
            let at_fault = failure.is_some_and(|failure| failure.stage == Some(stage));
            let how = if at_fault { "failure" } else { outcome };
            let mut span = self.stage(stage, start.seq, &id, (start.at, ended.at), how, false);
            span.status = failure.filter(|_| at_fault).map(|failure| failed(failure.message.clone()));
            spans.push(span);
        }
    }

    fn stage(
        &self,
        stage: Stage,
        seq: i64,
        attempt: &[u8],
        during: (OffsetDateTime, OffsetDateTime),
        outcome: &str,
        reused: bool,
    ) -> Span {
        let attributes = vec![
            attribute("cicd.pipeline.task.name", stage.name().into()),
            attribute("cicd.pipeline.task.run.id", format!("{}/{seq}", self.job.id)),
            attribute("cicd.pipeline.task.run.result", outcome.into()),
            KeyValue {
                value: Some(AnyValue { value: Some(Value::BoolValue(reused)) }),
                ..attribute("secateur.stage.reused", String::new())
            },
        ];
        let span = self.span("stage", seq, attempt.to_vec(), stage.name().into(), during);
        Span { attributes, ..span }
    }

    fn span(
        &self,
        kind: &str,
        seq: i64,
        parent: Vec<u8>,
        name: String,
        (begun, ended): (OffsetDateTime, OffsetDateTime),
    ) -> Span {
        Span {
            trace_id: self.parent.map_or(*self.job.id.as_bytes(), |parent| parent.trace).to_vec(),
            span_id: self.id(kind, seq),
            parent_span_id: parent,
            name,
            kind: SpanKind::Internal.into(),
            start_time_unix_nano: nanos(begun.min(ended)),
            end_time_unix_nano: nanos(ended),
            // Sampled.
            flags: 1,
            ..Span::default()
        }
    }

    /// The id of the span that event `seq` began.
    fn id(&self, kind: &str, seq: i64) -> Vec<u8> {
        span_id(self.job.id, kind, seq)
    }
}

fn span_id(job: Uuid, kind: &str, seq: i64) -> Vec<u8> {
    Sha256::digest(format!("{job}/{kind}/{seq}"))[..8].to_vec()
}

fn change((at, event): (usize, &EventRow)) -> Option<(usize, JobState)> {
    match &event.body {
        Entry::Job(JobEvent::StateChanged { state, .. }) => Some((at, *state)),
        Entry::Job(_) | Entry::Run(_) => None,
    }
}

/// `cicd.pipeline.result` of what ended in this state.
const fn result(state: JobState) -> &'static str {
    match state {
        JobState::Succeeded => "success",
        JobState::Failed => "failure",
        JobState::Cancelled | JobState::Paused => "cancellation",
        JobState::Queued | JobState::Running => "error",
    }
}

fn failed(message: String) -> Status {
    Status { code: StatusCode::Error.into(), message }
}

fn attribute(key: &str, value: String) -> KeyValue {
    let value = Some(AnyValue { value: Some(Value::StringValue(value)) });
    KeyValue { key: key.into(), value, ..KeyValue::default() }
}

fn number(key: &str, value: i64) -> KeyValue {
    KeyValue {
        value: Some(AnyValue { value: Some(Value::IntValue(value)) }),
        ..attribute(key, String::new())
    }
}

fn nanos(at: OffsetDateTime) -> u64 {
    u64::try_from(at.unix_timestamp_nanos()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> std::result::Result<Option<Traces>, String> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
        Traces::from_variables(find)
    }

    #[test]
    fn the_standard_variables_say_where_traces_go() {
        assert!(with(&[]).unwrap().is_none());
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/");
        assert_eq!(with(&[all]).unwrap().unwrap().url, "http://collector:4318/v1/traces");
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://collector/in");
        let set = with(&[
            all,
            own,
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic%20a2V5, x-scope=one"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "250"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=other,deployment.environment.name=test"),
            ("OTEL_SERVICE_NAME", "shears"),
        ]);
        let set = set.unwrap().unwrap();
        assert_eq!((set.url.as_str(), set.timeout), ("https://collector/in", Duration::from_millis(250)));
        let headers = [("authorization", "Basic a2V5"), ("x-scope", "one")];
        assert_eq!(set.headers, headers.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let names: Vec<&str> = set.resource.iter().map(|pair| pair.key.as_str()).collect();
        assert_eq!(names, ["deployment.environment.name", "service.name", "service.version"]);
        assert_eq!(set.resource[1], attribute("service.name", "shears".into()));
        assert!(!format!("{set:?}").contains("a2V5"), "headers are secrets");
        for off in [("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert!(with(&[all, off]).unwrap().is_none());
        }
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "nothing"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=%zz"),
        ] {
            let refused = with(&[all, (name, value)]).unwrap_err();
            assert!(refused.starts_with(name), "{refused}");
        }
        assert!(with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")]).is_err());
    }

    #[test]
    fn a_traceparent_is_read_as_w3c_has_it() {
        let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let fine = Parent::read(&format!("00-{trace}-{span}-01")).unwrap();
        assert_eq!(
            (hex::encode(fine.trace), hex::encode(fine.span), fine.sampled),
            (trace.into(), span.into(), true)
        );
        assert!(!Parent::read(&format!("00-{trace}-{span}-02")).unwrap().sampled);
        assert!(Parent::read(&format!("cc-{trace}-{span}-01-what-comes")).is_some());
        for wrong in [
            String::new(),
            format!("00-{trace}-{span}"),
            format!("00-{trace}-{span}-01-more"),
            format!("ff-{trace}-{span}-01"),
            format!("0-{trace}-{span}-01"),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            format!("00-{}-{span}-01", "0".repeat(32)),
            format!("00-{trace}-{}-01", "0".repeat(16)),
            format!("00-{}-{span}-01", &trace[1..]),
            format!("00-{trace}-{span}-1"),
            format!("00-{trace}-{span}-0x"),
        ] {
            assert_eq!(Parent::read(&wrong), None, "{wrong}");
        }
    }
}
