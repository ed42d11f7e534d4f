//! Exec, attach and port-forward, as `kubectl` does them: over a WebSocket that containerd's streaming server gives.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use skiff_cri_client::cri::{self, ContainerConfig};
use skiff_test_support::eventually;

use crate::node::{Container, Node, Pod, call, idle, pod_security, sh};

crate::under_both!(
    exec_streams,
    exec_on_a_terminal,
    attach_to_what_reads,
    stdin_once_ends_with_its_client,
    attach_to_a_terminal,
    port_forward;
    with_a_pause_container: port_forward_to_the_node;
    streaming: exec_streams, exec_on_a_terminal, attach_to_what_reads, stdin_once_ends_with_its_client,
        attach_to_a_terminal,
);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// A connection with channels, `v4.channel.k8s.io`: as much of RFC 6455 as that needs.
struct Channels {
    stream: TcpStream,
    /// What has come, by channel.
    received: [Vec<u8>; 5],
    ended: bool,
}

impl Channels {
    /// To an URL of the streaming server, which listens in the node's network.
    fn open(node: &Node, url: &str) -> Channels {
        let (host, path) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).expect("an URL");
        let mut stream =
            node.containerd.network().expect("a network").run(|| TcpStream::connect(host)).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: c2tpZmYgdGVzdHMgaXQuIQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).expect("send a request");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("an answer");
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head);
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        Channels { stream, received: Default::default(), ended: false }
    }

    fn send(&mut self, channel: u8, text: &str) {
        let length = u8::try_from(1 + text.len()).ok().filter(|length| *length < 126).expect("a short text");
        // One binary frame; its mask is zero, so it is as it was.
        let mut frame = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel];
        frame.extend(text.as_bytes());
        self.stream.write_all(&frame).expect("send a frame");
    }

    /// Takes the next frame.
    fn receive(&mut self) {
        let mut take = |length: usize| {
            let mut bytes = vec![0; length];
            self.stream.read_exact(&mut bytes).map(|()| bytes)
        };
        let Ok(head) = take(2) else {
            self.ended = true;
            return;
        };
        let length = match head[1] {
            126 => take(2).expect("a length").into_iter().fold(0, |all, byte| all << 8 | usize::from(byte)),
            127 => take(8).expect("a length").into_iter().fold(0, |all, byte| all << 8 | usize::from(byte)),
            short => usize::from(short),
        };
        let payload = take(length).expect("a payload");
        match (head[0] & 0xf, payload.split_first()) {
            (0x8, _) => self.ended = true,
            (_, Some((channel, bytes))) => self.received[usize::from(*channel)].extend(bytes),
            _ => (),
        }
    }

    /// Receives until there is `text` on a channel.
    #[track_caller]
    fn expect(&mut self, channel: u8, text: &str) {
        while !self.text(channel).contains(text) {
            assert!(!self.ended, "no {text:?} in {:?}", self.text(channel));
            self.receive();
        }
    }

    /// Receives until the other side ends.
    fn finish(&mut self) {
        while !self.ended {
            self.receive();
        }
    }

    fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.received[usize::from(channel)]).into_owned()
    }
}

fn exec(container: &Container, args: &[&str], tty: bool) -> Channels {
    let request = cri::ExecRequest {
        container_id: container.id.clone(),
        cmd: args.iter().map(ToString::to_string).collect(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let url = call!(container.node, exec, request).expect("an URL").url;
    Channels::open(container.node, &url)
}

fn attach(container: &Container, tty: bool) -> Channels {
    let container_id = container.id.clone();
    let request = cri::AttachRequest { container_id, stdin: true, tty, stdout: true, stderr: !tty };
    let url = call!(container.node, attach, request).expect("an URL").url;
    Channels::open(container.node, &url)
}

fn exec_streams(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    let mut streams = exec(&container, &["sh", "-c", "read line; echo got $line; echo and err >&2; exit 7"], false);
    streams.send(STDIN, "a line\n");
    streams.finish();
    assert_eq!((streams.text(STDOUT).as_str(), streams.text(STDERR).as_str()), ("got a line\n", "and err\n"));
    let status = streams.text(STATUS);
    assert!(status.contains(r#""reason":"NonZeroExitCode""#) && status.contains(r#""message":"7""#), "{status}");
    let mut streams = exec(&container, &["seq", "1", "30000"], false);
    streams.finish();
    let want: String = (1..=30_000).map(|n| format!("{n}\n")).collect();
    assert!(streams.text(STDOUT) == want, "not a byte is lost");
    assert!(streams.text(STATUS).contains(r#""status":"Success""#), "{}", streams.text(STATUS));
    pod.end();
}

fn exec_on_a_terminal(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(idle());
    let mut streams = exec(&container, &["sh"], true);
    streams.send(RESIZE, r#"{"Width":123,"Height":45}"#);
    streams.send(STDIN, "tty\n");
    streams.expect(STDOUT, "/dev/pts/");
    // The size is told beside the text, and may come later.
    eventually("the terminal has its size", || {
        streams.send(STDIN, "echo size $(stty size)\n");
        streams.expect(STDOUT, "\nsize ");
        streams.text(STDOUT).contains("size 45 123")
    });
    streams.send(STDIN, "exit 5\n");
    streams.finish();
    assert!(streams.text(STATUS).contains(r#""message":"5""#), "{}", streams.text(STATUS));
    pod.end();
}

fn attach_to_what_reads(node: &mut Node) {
    let pod = node.pod();
    let script = "while read line; do echo got $line; [ \"$line\" = end ] && exit 3; done; exit 4";
    let container = pod.start(ContainerConfig { stdin: true, ..sh(script) });
    for round in ["one", "two"] {
        let mut streams = attach(&container, false);
        streams.send(STDIN, &format!("{round}\n"));
        streams.expect(STDOUT, &format!("got {round}\n"));
    }
    let mut streams = attach(&container, false);
    streams.send(STDIN, "end\n");
    streams.finish();
    assert_eq!(container.ended().exit_code, 3, "stdin goes on from client to client");
    eventually("it is in the log", || container.output() == "got one\ngot two\ngot end\n");
    pod.end();
}

fn stdin_once_ends_with_its_client(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(ContainerConfig { stdin: true, stdin_once: true, ..sh("cat; exit 6") });
    let mut streams = attach(&container, false);
    streams.send(STDIN, "to and fro\n");
    streams.expect(STDOUT, "to and fro\n");
    drop(streams);
    assert_eq!(container.ended().exit_code, 6);
    pod.end();
}

fn attach_to_a_terminal(node: &mut Node) {
    let pod = node.pod();
    let container = pod.start(ContainerConfig { stdin: true, tty: true, ..sh("tty; exec sh") });
    eventually("the terminal is in the log", || container.output().contains("/dev/pts/"));
    let mut streams = attach(&container, true);
    streams.send(STDIN, "echo $((6 * 7))\n");
    streams.expect(STDOUT, "42");
    streams.send(STDIN, "exit 8\n");
    streams.finish();
    assert_eq!(container.ended().exit_code, 8);
    pod.end();
}

fn port_forward(node: &mut Node) {
    forward(node, node.pod());
}

/// Without a pause container containerd 2.1 itself crashes on such a pod.
fn port_forward_to_the_node(node: &mut Node) {
    let pod = node.pod_with(|config| {
        let options = pod_security(config).namespace_options.get_or_insert_default();
        options.network = cri::NamespaceMode::Node.into();
        config.hostname = String::new();
    });
    forward(node, pod);
}

fn forward(node: &Node, pod: Pod) {
    let server = pod.start(sh("echo through the forward | nc -l -p 8000"));
    eventually("the server listens", || server.says("cat /proc/net/tcp /proc/net/tcp6").contains(":1F40 "));
    let request = cri::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8000] };
    let url = call!(node, port_forward, request).expect("an URL").url;
    // Channel 0 is the connection, channel 1 its errors; each begins with the port.
    let mut streams = Channels::open(node, &format!("{url}?port=8000"));
    streams.expect(0, "through the forward\n");
    assert_eq!(streams.received[0][..2], 8000u16.to_le_bytes());
    drop(streams);
    server.ended();
    pod.end();
}
