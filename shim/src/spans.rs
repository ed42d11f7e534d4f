//! Spans of requests, and of the steps of a create, for a collector of OpenTelemetry where OTEL_* in the environment names
//! one: OTLP over HTTP, as protobuf. Does not live here: what is done meanwhile (task), the marks of a create (the library).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::{self, CodedOutputStream};
use skiff::launch::chore;
use skiff::trace::{Trace, Track};
use skiff::{Error, Kind, Result};
use tokio::sync::Notify;

use crate::pending::Call;
use crate::process::settle;

/// Most spans that are kept between two exports; beyond that the newest are lost.
const MAX_QUEUED: usize = 2048;
/// How long a collector may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest status line that is read, bytes.
const MAX_LINE: u64 = 4096;
/// The specification's: between two exports.
const DELAY: Duration = Duration::from_secs(5);

/// Whose child a span is: `traceparent` of the W3C, as containerd sends it along with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    trace: u128,
    span: u64,
    sampled: bool,
}

impl Context {
    /// Reads `00-TRACE-SPAN-FLAGS`; None when it is not that.
    pub fn parse(traceparent: &str) -> Option<Context> {
        let mut parts = traceparent.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex = |text: &str, digits| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !(hex(version, 2) && version != "ff" && hex(trace, 32) && hex(span, 16) && hex(flags, 2)) {
            return None;
        }
        let context = Context {
            trace: u128::from_str_radix(trace, 16).ok()?,
            span: u64::from_str_radix(span, 16).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 != 0,
        };
        (context.trace != 0 && context.span != 0).then_some(context)
    }
}

/// Which requests have spans (opentelemetry.io, "OTEL_TRACES_SAMPLER").
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sampler {
    /// What belongs to something goes by that.
    by_parent: bool,
    /// Of the others, this part.
    ratio: f64,
}

impl Sampler {
    fn named(name: &str, argument: Option<&str>) -> Option<Sampler> {
        let (by_parent, name) = name.strip_prefix("parentbased_").map_or((false, name), |name| (true, name));
        let ratio = match name {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => argument.unwrap_or("1").parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio))?,
            _ => return None,
        };
        Some(Sampler { by_parent, ratio })
    }

    fn takes(self, trace: u128, parent: Option<Context>) -> bool {
        match parent.filter(|_| self.by_parent) {
            Some(parent) => parent.sampled,
            None => (((trace as u64) >> 11) as f64) < self.ratio * 2f64.powi(53),
        }
    }
}

/// Spans on their way to the collector.
pub struct Spans {
    collector: SocketAddr,
    /// Of the request.
    path: String,
    /// Lines of the request.
    headers: String,
    service: String,
    sampler: Sampler,
    delay: Duration,
    /// Encoded.
    queue: RefCell<Vec<Vec<u8>>>,
    filled: Notify,
    /// Of creates under way, by container.
    steps: RefCell<BTreeMap<String, Trace>>,
    /// The last export failed, and it has been said.
    failing: Cell<bool>,
    ids: RandomState,
    next_id: Cell<u64>,
}

impl Spans {
    /// What the environment asks for (opentelemetry.io, "OTLP Exporter Configuration"); None when that is nothing.
    pub fn asked_for() -> Option<Rc<Spans>> {
        match configure(|name| std::env::var(name).ok().filter(|value| !value.is_empty())) {
            Ok(spans) => spans.map(Rc::new),
            Err(err) => {
                log::warn!("{err}: there will be no spans");
                None
            }
        }
    }

    /// A timeline for the create of this container.
    pub fn of_create(&self, id: &str) -> Option<Trace> {
        let trace = Trace::new().ok()?;
        self.steps.borrow_mut().insert(id.to_string(), trace.clone());
        Some(trace)
    }

    /// Notes a request that has been answered, and the steps of a create.
    pub fn add(&self, call: &Call, error: Option<&Error>) {
        // Who was refused because of another create has no steps of its own.
        let made = call.name == "Create" && error.is_none_or(|err| err.kind() != Kind::AlreadyExists);
        let steps = if made { self.steps.borrow_mut().remove(&call.id) } else { None };
        let trace = call.parent.map_or_else(|| u128::from(self.id()) << 64 | u128::from(self.id()), |p| p.trace);
        if !self.sampler.takes(trace, call.parent) {
            return;
        }
        let end = nanos(SystemTime::now());
        let mut attributes = vec![("rpc.system", "ttrpc"), ("rpc.method", call.name), ("container.id", &call.id)];
        if !call.exec_id.is_empty() {
            attributes.push(("exec.id", &call.exec_id));
        }
        let error = error.map(ToString::to_string);
        let span = Span {
            trace,
            id: self.id(),
            parent: call.parent.map(|parent| parent.span),
            name: call.name,
            kind: SERVER,
            times: (end.saturating_sub(call.since.elapsed().as_nanos() as u64), end),
            attributes: &attributes,
            error: error.as_deref(),
        };
        self.queue(&span);
        for step in steps.and_then(|trace| trace.steps().ok()).into_iter().flatten() {
            let side = if step.side == Track::Parent { "runtime" } else { "container init" };
            self.queue(&Span {
                id: self.id(),
                parent: Some(span.id),
                name: &step.name,
                kind: INTERNAL,
                times: (step.begin, step.end),
                attributes: &[("process", side)],
                error: None,
                ..span
            });
        }
    }

    fn queue(&self, span: &Span<'_>) {
        let mut queue = self.queue.borrow_mut();
        if queue.len() < MAX_QUEUED
            && let Ok(bytes) = span.encode()
        {
            queue.push(bytes);
            self.filled.notify_one();
        }
    }

    /// Sends what there is, now and then.
    pub async fn export(self: Rc<Self>) {
        loop {
            self.filled.notified().await;
            tokio::time::sleep(self.delay).await;
            self.flush().await;
        }
    }

    /// Sends what there is. A child waits for the collector.
    pub async fn flush(&self) {
        let spans = self.queue.take();
        if spans.is_empty() {
            return;
        }
        let sent = async {
            let body = self.encode(&spans).map_err(|err| Error::new(Kind::System, err.to_string()))?;
            settle(chore::start("export spans", PATIENCE, || self.post(&body))?).await
        };
        match sent.await {
            Ok(()) => self.failing.set(false),
            Err(err) if !self.failing.replace(true) => log::warn!("{} spans are lost: {err}", spans.len()),
            Err(_) => {}
        }
    }

    /// One POST of HTTP/1.1. A library for it would bring glibc's resolver along, which, statically linked, takes a tenth of
    /// what an idle shim has in memory.
    fn post(&self, body: &[u8]) -> Result<()> {
        let fail = |err| Error::io(format!("export spans to {:?}", self.collector.to_string()), &err);
        let post = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&self.collector, PATIENCE)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let head = format!(
                "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/x-protobuf\r\nContent-Length: {}\r\n\
                 Connection: close\r\n{}\r\n",
                self.path,
                self.collector,
                body.len(),
                self.headers
            );
            stream.write_all(head.as_bytes())?;
            stream.write_all(body)?;
            let mut status = String::new();
            BufReader::new(stream.take(MAX_LINE)).read_line(&mut status)?;
            Ok(status)
        };
        let status = post().map_err(fail)?;
        // HTTP/1.1 200 OK
        if status.starts_with("HTTP/1.") && status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
            return Ok(());
        }
        let text = format!("export spans to {:?}: answered {:?}", self.collector.to_string(), status.trim_end());
        Err(Error::new(Kind::System, text))
    }

    /// ExportTraceServiceRequest of opentelemetry/proto/collector/trace/v1.
    fn encode(&self, spans: &[Vec<u8>]) -> protobuf::Result<Vec<u8>> {
        let resource = message(|out| attribute(out, 1, "service.name", &self.service))?;
        let scope = message(|out| {
            out.write_string(1, "skiff")?;
            out.write_string(2, env!("CARGO_PKG_VERSION"))
        })?;
        let of_scope = message(|out| {
            out.write_bytes(1, &scope)?;
            spans.iter().try_for_each(|span| out.write_bytes(2, span))
        })?;
        let of_resource = message(|out| {
            out.write_bytes(1, &resource)?;
            out.write_bytes(2, &of_scope)
        })?;
        message(|out| out.write_bytes(1, &of_resource))
    }

    /// One that nobody else has: never 0.
    fn id(&self) -> u64 {
        self.next_id.set(self.next_id.get() + 1);
        let mut hasher = self.ids.build_hasher();
        hasher.write_u64(self.next_id.get());
        hasher.finish().max(1)
    }
}

/// SpanKind.
const INTERNAL: i32 = 1;
const SERVER: i32 = 2;
/// StatusCode.
const ERROR: i32 = 2;

/// Span of opentelemetry/proto/trace/v1.
struct Span<'a> {
    trace: u128,
    id: u64,
    parent: Option<u64>,
    name: &'a str,
    kind: i32,
    /// Nanoseconds since 1970.
    times: (u64, u64),
    attributes: &'a [(&'a str, &'a str)],
    error: Option<&'a str>,
}

impl Span<'_> {
    fn encode(&self) -> protobuf::Result<Vec<u8>> {
        message(|out| {
            out.write_bytes(1, &self.trace.to_be_bytes())?;
            out.write_bytes(2, &self.id.to_be_bytes())?;
            if let Some(parent) = self.parent {
                out.write_bytes(4, &parent.to_be_bytes())?;
            }
            out.write_string(5, self.name)?;
            out.write_enum(6, self.kind)?;
            out.write_fixed64(7, self.times.0)?;
            out.write_fixed64(8, self.times.1)?;
            self.attributes.iter().try_for_each(|(key, value)| attribute(out, 9, key, value))?;
            let Some(error) = self.error else { return Ok(()) };
            let status = message(|out| {
                out.write_string(2, error)?;
                out.write_enum(3, ERROR)
            })?;
            out.write_bytes(15, &status)
        })
    }
}

fn message(write: impl FnOnce(&mut CodedOutputStream<'_>) -> protobuf::Result<()>) -> protobuf::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut out = CodedOutputStream::vec(&mut bytes);
    write(&mut out)?;
    out.flush()?;
    drop(out);
    Ok(bytes)
}

/// KeyValue with a string.
fn attribute(out: &mut CodedOutputStream<'_>, field: u32, key: &str, value: &str) -> protobuf::Result<()> {
    let value = message(|out| out.write_string(1, value))?;
    let pair = message(|out| {
        out.write_string(1, key)?;
        out.write_bytes(2, &value)
    })?;
    out.write_bytes(field, &pair)
}

fn nanos(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

fn configure(var: impl Fn(&str) -> Option<String>) -> Result<Option<Spans>> {
    // That of traces alone goes before the one of all signals.
    let of_traces = |name: &str| {
        let (all, own) = (format!("OTEL_EXPORTER_OTLP_{name}"), format!("OTEL_EXPORTER_OTLP_TRACES_{name}"));
        var(&own).map(|value| (own, value)).or_else(|| var(&all).map(|value| (all, value)))
    };
    let Some((named, endpoint)) = of_traces("ENDPOINT") else { return Ok(None) };
    let off = |name: &str, on: &str| var(name).is_some_and(|value| value != on);
    if var("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || off("OTEL_TRACES_EXPORTER", "otlp")
    {
        return Ok(None);
    }
    if let Some((name, protocol)) = of_traces("PROTOCOL").filter(|(_, protocol)| protocol != "http/protobuf") {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{name}: {protocol:?}, only \"http/protobuf\" is supported"),
        ));
    }
    let Some((collector, path)) = place(&endpoint) else {
        let text = format!("{named}: {endpoint:?}, only http:// with an IP address or localhost is supported");
        return Err(Error::new(Kind::Unsupported, text));
    };
    let path = match path {
        path if named.ends_with("_TRACES_ENDPOINT") => format!("/{path}"),
        "" => "/v1/traces".into(),
        path => format!("/{}/v1/traces", path.trim_end_matches('/')),
    };
    let sampler = var("OTEL_TRACES_SAMPLER").unwrap_or_else(|| "parentbased_always_on".into());
    let argument = var("OTEL_TRACES_SAMPLER_ARG");
    let Some(sampler) = Sampler::named(&sampler, argument.as_deref()) else {
        let text = format!("OTEL_TRACES_SAMPLER: {sampler:?} with {argument:?} is not supported");
        return Err(Error::new(Kind::Unsupported, text));
    };
    let headers = of_traces("HEADERS").map(|(_, value)| value).unwrap_or_default();
    let line = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        let line = format!("{}: {}", key.trim(), unescaped(value.trim()));
        (!line.contains(char::is_control)).then(|| format!("{line}\r\n"))
    };
    let delay = var("OTEL_BSP_SCHEDULE_DELAY").and_then(|millis| millis.parse().ok()).map(Duration::from_millis);
    Ok(Some(Spans {
        collector,
        path,
        headers: headers.split(',').filter_map(line).collect(),
        sampler,
        service: var("OTEL_SERVICE_NAME").unwrap_or_else(|| "containerd-shim-skiff-v2".into()),
        delay: delay.unwrap_or(DELAY),
        queue: RefCell::default(),
        filled: Notify::new(),
        steps: RefCell::default(),
        failing: Cell::new(false),
        ids: RandomState::new(),
        next_id: Cell::new(0),
    }))
}

/// What `%XX` stands for (W3C Baggage, "Value").
fn unescaped(text: &str) -> String {
    let (mut out, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let hex = |bytes: &[u8]| u8::from_str_radix(std::str::from_utf8(bytes).ok()?, 16).ok();
        match after.get(..2).filter(|_| *first == b'%').and_then(hex) {
            Some(byte) => (out.push(byte), rest = &after[2..]),
            None => (out.push(*first), rest = after),
        };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Address and path of `http://ADDRESS[:PORT][/PATH]`.
fn place(url: &str) -> Option<(SocketAddr, &str)> {
    let rest = url.strip_prefix("http://")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = match host.strip_prefix("localhost") {
        Some(port) => format!("127.0.0.1{port}"),
        None => host.to_string(),
    };
    let address = host.parse().ok().or_else(|| format!("{host}:80").parse().ok())?;
    (!path.contains(|c: char| c.is_control() || c == ' ')).then_some((address, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(vars: &[(&str, &str)]) -> Result<Option<String>> {
        let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        configure(var).map(|spans| spans.map(|spans| format!("{}{}", spans.collector, spans.path)))
    }

    #[test]
    fn the_environment_says_where_to() {
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318/");
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://[::1]:1/here");
        assert_eq!(configured(&[]).unwrap(), None);
        assert_eq!(configured(&[all]).unwrap().unwrap(), "127.0.0.1:4318/v1/traces");
        assert_eq!(configured(&[all, own]).unwrap().unwrap(), "[::1]:1/here");
        let below = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://10.0.0.1/otel/");
        assert_eq!(configured(&[below]).unwrap().unwrap(), "10.0.0.1:80/otel/v1/traces");
        assert_eq!(configured(&[all, ("OTEL_SDK_DISABLED", "true")]).unwrap(), None);
        assert_eq!(configured(&[all, ("OTEL_TRACES_EXPORTER", "none")]).unwrap(), None);
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://127.0.0.1"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/a b"),
        ] {
            let err = configured(&[all, (name, value)]).unwrap_err().to_string();
            assert!(err.starts_with(&format!("{name}: {value:?}, only ")), "{err}");
        }
    }

    #[test]
    fn headers_are_unescaped_and_stay_lines() {
        let all = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Basic%20abc, b=50%,bad=x%0d%0ay,%C3%A4=%C3%A4"),
        ];
        let var = |name: &str| all.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        let spans = configure(var).unwrap().unwrap();
        assert_eq!(spans.headers, "Authorization: Basic abc\r\nb: 50%\r\n%C3%A4: ä\r\n");
    }

    #[test]
    fn samplers_are_those_of_opentelemetry() {
        let context = |sampled| Some(Context { trace: 1, span: 1, sampled });
        let takes = |name: &str, argument, trace, parent| Sampler::named(name, argument).unwrap().takes(trace, parent);
        assert!(takes("always_on", None, u128::MAX, context(false)) && !takes("always_off", None, 1, context(true)));
        assert!(takes("parentbased_always_off", None, 1, context(true)));
        assert!(!takes("parentbased_always_on", None, 1, context(false)));
        assert!(takes("traceidratio", Some("0.25"), 1, None));
        assert!(!takes("traceidratio", Some("0.25"), u128::from(u64::MAX), None));
        assert_eq!(Sampler::named("jaeger_remote", None), None);
        assert_eq!(Sampler::named("traceidratio", Some("2")), None);
    }

    #[test]
    fn a_parent_is_what_the_w3c_says() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = Context::parse(text).unwrap();
        assert_eq!((context.trace, context.span), (0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c, 0xb7ad_6b71_6920_3331));
        assert!(context.sampled && !Context::parse(&text.replace("-01", "-00")).unwrap().sampled);
        for bad in
            ["", "00", "ff-x", &text.replace('a', "g"), &text.replace("0af7", "af7"), &text.replace("00-", "ff-")]
        {
            assert_eq!(Context::parse(bad), None, "{bad}");
        }
    }
}
