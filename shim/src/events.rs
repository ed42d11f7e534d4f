//! Events to containerd's ttrpc events service: one ordered queue, retried at its head, never waited for by a request.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context::with_timeout;
use tokio::sync::Notify;

/// Events kept while containerd is away; beyond that the oldest are lost, as containerd looks at states afterwards.
const MAX_QUEUED: usize = 2048;
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// The queue. Clones share it.
#[derive(Clone)]
pub struct Events {
    queue: Rc<Queue>,
}

struct Queue {
    namespace: String,
    /// Somebody is there to send to.
    published: bool,
    /// Encoded: containerd may be away for long, and a message takes several times as much.
    envelopes: RefCell<VecDeque<Box<[u8]>>>,
    filled: Notify,
    emptied: Notify,
}

impl Events {
    /// Publishes to the socket at `address` (TTRPC_ADDRESS), from a task of its own. Without an address events are dropped.
    pub fn new(namespace: &str, address: Option<String>) -> Events {
        let queue = Rc::new(Queue {
            namespace: namespace.to_string(),
            published: address.is_some(),
            envelopes: RefCell::default(),
            filled: Notify::new(),
            emptied: Notify::new(),
        });
        if let Some(address) = address {
            tokio::task::spawn_local(publish(queue.clone(), address));
        }
        Events { queue }
    }

    /// Queues an event; `topic` is e.g. `/tasks/exit`.
    pub fn send<M: Message>(&self, topic: &str, event: &M) {
        if !self.queue.published {
            return;
        }
        let Ok(value) = event.write_to_bytes() else { return };
        // Not from the descriptor: building it takes more memory than all else that this shim holds.
        let any = Any { type_url: format!("containerd.events.{}", M::NAME), value, ..Any::default() };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.queue.namespace.clone(),
            topic: topic.to_string(),
            event: MessageField::some(any),
            ..Envelope::default()
        };
        let Ok(envelope) = envelope.write_to_bytes() else { return };
        let mut queue = self.queue.envelopes.borrow_mut();
        if queue.len() == MAX_QUEUED
            && let Some(lost) = queue.pop_front()
        {
            log::error!("event {} is lost: {MAX_QUEUED} others wait for containerd", topic_of(&lost));
        }
        queue.push_back(envelope.into());
        self.queue.filled.notify_one();
    }

    /// Waits until all have been sent.
    pub async fn flushed(&self) {
        while !self.queue.envelopes.borrow().is_empty() {
            self.queue.emptied.notified().await;
        }
    }
}

async fn publish(queue: Rc<Queue>, address: String) {
    let address = if address.contains("://") { address } else { format!("unix://{address}") };
    let mut client: Option<EventsClient> = None;
    let mut pause = Duration::from_millis(50);
    loop {
        let Some(envelope) = queue.envelopes.borrow().front().cloned() else {
            queue.emptied.notify_waiters();
            queue.filled.notified().await;
            continue;
        };
        match send(&mut client, &address, &envelope).await {
            Ok(()) => {
                pause = Duration::from_millis(50);
                let mut queue = queue.envelopes.borrow_mut();
                // The head may have been dropped for a newer event meanwhile.
                if queue.front() == Some(&envelope) {
                    queue.pop_front();
                }
            }
            Err(err) => {
                log::debug!("event {} is not sent yet: {err}", topic_of(&envelope));
                client = None;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
        }
    }
}

fn topic_of(envelope: &[u8]) -> String {
    Envelope::parse_from_bytes(envelope).map(|envelope| envelope.topic).unwrap_or_default()
}

async fn send(client: &mut Option<EventsClient>, address: &str, envelope: &[u8]) -> Result<(), String> {
    let connected = match client {
        Some(client) => client,
        None => {
            let connection = Client::connect(address).await.map_err(|e| e.to_string())?;
            client.insert(EventsClient::new(connection))
        }
    };
    let envelope = Envelope::parse_from_bytes(envelope).map_err(|e| e.to_string())?;
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
    let context = with_timeout(SEND_TIMEOUT.as_nanos() as i64);
    connected.forward(context, &request).await.map(drop).map_err(|e| e.to_string())
}

/// A protobuf timestamp.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Timestamp::default() }
}
