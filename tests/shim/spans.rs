//! Spans for OpenTelemetry: what a collector is sent, decoded by OpenTelemetry's own messages. skiff's own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use containerd_shim_protos::ttrpc::Code;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use prost::Message;
use skiff_test_support::{Bundle, eventually, unique};

use crate::daemon::{Daemon, Form, context, is_skiff, refused};

/// Takes requests as a collector does; those that it has taken.
fn collector() -> (String, Arc<Mutex<Vec<ExportTraceServiceRequest>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let taken = Arc::new(Mutex::new(Vec::new()));
    let requests = taken.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let head: Vec<String> = (&mut reader).lines().map(Result::unwrap).take_while(|l| !l.is_empty()).collect();
            assert!(head[0].starts_with("POST /v1/traces HTTP/1.1"), "{head:?}");
            let field = |name: &str| {
                let of = |line: &String| {
                    let (key, value) = line.split_once(": ")?;
                    key.eq_ignore_ascii_case(name).then(|| value.to_string())
                };
                head.iter().find_map(of).unwrap_or_else(|| panic!("{name}: {head:?}"))
            };
            assert_eq!((field("content-type").as_str(), field("x-key").as_str()), ("application/x-protobuf", "word"));
            let mut body = vec![0; field("content-length").parse().unwrap()];
            reader.read_exact(&mut body).unwrap();
            requests.lock().unwrap().push(ExportTraceServiceRequest::decode(&body[..]).unwrap());
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
        }
    });
    (address, taken)
}

fn attribute<'a>(attributes: &'a [KeyValue], key: &str) -> &'a str {
    match attributes.iter().find(|pair| pair.key == key).and_then(|pair| pair.value.as_ref()) {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => text,
        other => panic!("{key}: {other:?} of {attributes:?}"),
    }
}

fn spans(requests: &[ExportTraceServiceRequest]) -> Vec<Span> {
    let of_resources = requests.iter().flat_map(|request| &request.resource_spans);
    of_resources
        .flat_map(|resource| {
            assert_eq!(attribute(&resource.resource.as_ref().unwrap().attributes, "service.name"), "the-shim");
            resource.scope_spans.iter().flat_map(|scope| scope.spans.clone())
        })
        .collect()
}

#[test]
fn a_collector_gets_requests_and_the_steps_of_a_create() {
    if !is_skiff() {
        return;
    }
    let (address, taken) = collector();
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", address.as_str()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=word"),
        ("OTEL_SERVICE_NAME", "the-shim"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ];
    let bundle = Bundle::new(&["sleep", "1000"]);
    let daemon = Daemon::launch_as(bundle, unique("rawtest"), &Form::Options(None), false, &environment);
    let mut parent = context();
    parent.add("traceparent".into(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    daemon.client.create(parent, &daemon.create_request()).unwrap();
    let mut unsampled = context();
    unsampled.add("traceparent".into(), "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00".into());
    daemon.client.start(unsampled, &daemon.start_request("")).unwrap();
    refused(daemon.begin("no-such"), Code::NOT_FOUND);
    daemon.finish();
    let (id, socket) = (daemon.id.clone(), daemon.address.clone());
    // What is left goes out at its end.
    daemon.end();
    eventually("the last span has come", || spans(&taken.lock().unwrap()).iter().any(|span| span.name == "Shutdown"));
    let all = spans(&taken.lock().unwrap());
    let named = |name: &str| all.iter().filter(|span| span.name == name).collect::<Vec<_>>();

    let [create] = named("Create")[..] else { panic!("{socket}: {all:?}") };
    assert_eq!(create.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    assert_eq!(create.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
    assert_eq!((create.kind, create.status.clone()), (SpanKind::Server as i32, None));
    assert_eq!(attribute(&create.attributes, "rpc.method"), "Create");
    assert_eq!(attribute(&create.attributes, "container.id"), id);
    let steps: Vec<_> = all.iter().filter(|span| span.parent_span_id == create.span_id).collect();
    for (process, step) in [("runtime", "clone the init"), ("container init", "mounts")] {
        let there = |span: &&&Span| attribute(&span.attributes, "process") == process && span.name.contains(step);
        let span = steps.iter().find(there).unwrap_or_else(|| panic!("{step}: {steps:?}"));
        assert_eq!((&span.trace_id, span.kind), (&create.trace_id, SpanKind::Internal as i32));
        assert!(create.start_time_unix_nano <= span.start_time_unix_nano, "{span:?} of {create:?}");
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{span:?}");
    }

    let [start] = named("Start")[..] else { panic!("one is not sampled: {all:?}") };
    assert_eq!(attribute(&start.attributes, "exec.id"), "no-such");
    assert!(start.parent_span_id.is_empty() && start.trace_id != create.trace_id, "{start:?}");
    let status = start.status.as_ref().unwrap();
    assert_eq!(status.code, StatusCode::Error as i32);
    assert!(status.message.contains("no-such"), "{status:?}");
    assert_eq!((named("Kill").len(), named("Wait").len(), named("Delete").len()), (1, 1, 1));
    let mut ids: Vec<_> = all.iter().map(|span| &span.span_id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), all.len(), "no two are the same");
}

#[test]
fn a_collector_that_is_not_there_is_told_of_once() {
    if !is_skiff() {
        return;
    }
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("http://{nobody}");
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "20")];
    let bundle = Bundle::new(&["true"]);
    let daemon = Daemon::launch_as(bundle, unique("rawtest"), &Form::Options(None), false, &environment);
    let mut log = String::new();
    let mut life = || {
        daemon.create().unwrap();
        daemon.begin("").unwrap();
        assert_eq!(daemon.wait("").unwrap(), 0);
        daemon.delete("").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        log.push_str(&daemon.logged());
    };
    (0..5).for_each(|_| life());
    assert_eq!(log.matches("spans are lost").count(), 1, "{log}");
    daemon.end();
}
