//! Events to containerd: one queue, one sender, so the order in which the service publishes is the order in which
//! containerd gets them. While containerd is down the first event waits and is tried again; the queue is bounded, and
//! what does not fit is dropped with a warning.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task as messages;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

/// The most events that wait for containerd.
const QUEUE: usize = 1024;
/// How long one event is tried before it is dropped: containerd may be down for an upgrade.
const GIVE_UP: Duration = Duration::from_secs(300);
/// How long one call may take.
const CALL: Duration = Duration::from_secs(5);
/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A task event of containerd. Without `Debug`: the messages' own needs protobuf's reflection, a megabyte of program
/// that each shim would hold in memory.
#[derive(Clone, PartialEq)]
pub enum Event {
    /// Task created.
    Create(messages::TaskCreate),
    /// Task started.
    Start(messages::TaskStart),
    /// Task out of memory.
    Oom(messages::TaskOOM),
    /// Task ended.
    Exit(messages::TaskExit),
    /// Task deleted.
    Delete(messages::TaskDelete),
    /// Task paused.
    Paused(messages::TaskPaused),
    /// Task goes on.
    Resumed(messages::TaskResumed),
    /// Task was saved to a directory.
    Checkpointed(messages::TaskCheckpointed),
}

impl Event {
    /// The topic that containerd files it under (runtime/events.go of containerd).
    pub fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => "/tasks/create",
            Self::Start(_) => "/tasks/start",
            Self::Oom(_) => "/tasks/oom",
            Self::Exit(_) => "/tasks/exit",
            Self::Delete(_) => "/tasks/delete",
            Self::Paused(_) => "/tasks/paused",
            Self::Resumed(_) => "/tasks/resumed",
            Self::Checkpointed(_) => "/tasks/checkpointed",
        }
    }

    fn any(&self) -> Any {
        match self {
            Self::Create(event) => any("containerd.events.TaskCreate", event),
            Self::Start(event) => any("containerd.events.TaskStart", event),
            Self::Oom(event) => any("containerd.events.TaskOOM", event),
            Self::Exit(event) => any("containerd.events.TaskExit", event),
            Self::Delete(event) => any("containerd.events.TaskDelete", event),
            Self::Paused(event) => any("containerd.events.TaskPaused", event),
            Self::Resumed(event) => any("containerd.events.TaskResumed", event),
            Self::Checkpointed(event) => any("containerd.events.TaskCheckpointed", event),
        }
    }
}

/// A message as containerd's typeurl writes it: the bare full name as type URL.
pub fn any(name: &str, message: &impl Message) -> Any {
    // Writing to memory fails only for messages beyond 2 GiB.
    let value = message.write_to_bytes().unwrap_or_default();
    Any { type_url: name.to_owned(), value, ..Default::default() }
}

/// A point in time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}

/// What is in the queue.
pub enum Item {
    /// An event and when it happened.
    Event(SystemTime, Event),
    /// Everything before this has been delivered or dropped.
    Mark(oneshot::Sender<()>),
}

/// The near end of the queue.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Item>,
}

impl Events {
    /// A queue and its far end.
    pub fn queue() -> (Self, mpsc::Receiver<Item>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Self { queue }, receiver)
    }

    /// Appends an event; never waits.
    pub fn publish(&self, event: Event) {
        let item = Item::Event(SystemTime::now(), event);
        if let Err(mpsc::error::TrySendError::Full(Item::Event(_, event))) = self.queue.try_send(item) {
            warn!(topic = event.topic(), "containerd takes no events: one is dropped");
        }
    }

    /// Waits until all events so far are delivered or dropped.
    pub async fn flush(&self) {
        let (mark, passed) = oneshot::channel();
        if self.queue.send(Item::Mark(mark)).await.is_ok() {
            let _ = passed.await;
        }
    }
}

/// Carries events away.
#[async_trait]
pub trait Transport: Send {
    /// Delivers one event.
    async fn forward(&mut self, envelope: Envelope) -> Result<(), ttrpc::Error>;
}

/// containerd's events service.
pub struct Containerd {
    address: String,
    client: Option<EventsClient>,
}

impl Containerd {
    /// The service behind a Unix socket; it is dialled when there is something to say.
    pub fn new(address: &str) -> Self {
        Self { address: address.trim_start_matches("unix://").to_owned(), client: None }
    }
}

#[async_trait]
impl Transport for Containerd {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), ttrpc::Error> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let socket = Socket::connect_unix(&self.address)
                    .await
                    .map_err(|error| ttrpc::Error::Socket(format!("{}: {error}", self.address)))?;
                self.client.insert(EventsClient::new(Client::new(socket)))
            }
        };
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        let timeout = context::with_duration(CALL);
        let result = client.forward(timeout, &request).await.map(|_| ());
        if result.is_err() {
            self.client = None;
        }
        result
    }
}

/// Forwards events until the last near end is gone and the queue is empty.
pub async fn forward(namespace: String, mut queue: mpsc::Receiver<Item>, mut transport: impl Transport) {
    while let Some(item) = queue.recv().await {
        match item {
            Item::Event(at, event) => deliver(&namespace, at, &event, &mut transport).await,
            // Who waits for it may have given up.
            Item::Mark(mark) => drop(mark.send(())),
        }
    }
}

/// Tries until it is taken or too old.
async fn deliver(namespace: &str, at: SystemTime, event: &Event, transport: &mut impl Transport) {
    let envelope = Envelope {
        timestamp: MessageField::some(timestamp(at)),
        namespace: namespace.to_owned(),
        topic: event.topic().into(),
        event: MessageField::some(event.any()),
        ..Default::default()
    };
    let mut pause = PAUSES.0;
    loop {
        let error = match transport.forward(envelope.clone()).await {
            Ok(()) => return,
            Err(error) => error,
        };
        if at.elapsed().is_ok_and(|age| age > GIVE_UP) {
            warn!(topic = event.topic(), %error, "containerd has not taken an event for five minutes: dropped");
            return;
        }
        debug!(topic = event.topic(), %error, "containerd does not take an event: trying again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Flaky {
        failures: u32,
        taken: std::sync::mpsc::Sender<(String, String)>,
    }

    #[async_trait]
    impl Transport for Flaky {
        async fn forward(&mut self, envelope: Envelope) -> Result<(), ttrpc::Error> {
            if self.failures > 0 {
                self.failures -= 1;
                return Err(ttrpc::Error::RemoteClosed);
            }
            assert!(envelope.timestamp.seconds > 0);
            self.taken.send((envelope.topic.clone(), envelope.event.type_url.clone())).unwrap();
            Ok(())
        }
    }

    #[tokio::test]
    async fn events_arrive_in_order_when_containerd_was_down_for_a_while() {
        let (events, queue) = Events::queue();
        let (taken, got) = std::sync::mpsc::channel();
        events.publish(Event::Create(messages::TaskCreate::new()));
        events.publish(Event::Start(messages::TaskStart::new()));
        drop(events);

        forward("default".into(), queue, Flaky { failures: 2, taken }).await;

        let got: Vec<_> = got.iter().collect();
        assert_eq!(
            got,
            [
                ("/tasks/create".to_owned(), "containerd.events.TaskCreate".to_owned()),
                ("/tasks/start".to_owned(), "containerd.events.TaskStart".to_owned())
            ]
        );
    }

    #[test]
    fn publish_into_a_full_queue_drops_and_does_not_wait() {
        let (events, mut queue) = Events::queue();
        for _ in 0..QUEUE + 3 {
            events.publish(Event::Paused(messages::TaskPaused::new()));
        }
        let mut kept = 0;
        while queue.try_recv().is_ok() {
            kept += 1;
        }
        assert_eq!(kept, QUEUE);
    }

    #[test]
    fn type_urls_are_the_full_names_of_the_messages() {
        use containerd_shim_protos::protobuf::MessageFull;
        let events = [
            (Event::Create(Default::default()), messages::TaskCreate::descriptor()),
            (Event::Start(Default::default()), messages::TaskStart::descriptor()),
            (Event::Oom(Default::default()), messages::TaskOOM::descriptor()),
            (Event::Exit(Default::default()), messages::TaskExit::descriptor()),
            (Event::Delete(Default::default()), messages::TaskDelete::descriptor()),
            (Event::Paused(Default::default()), messages::TaskPaused::descriptor()),
            (Event::Resumed(Default::default()), messages::TaskResumed::descriptor()),
            (Event::Checkpointed(Default::default()), messages::TaskCheckpointed::descriptor()),
        ];
        for (event, descriptor) in events {
            assert_eq!(event.any().type_url, descriptor.full_name());
        }
    }
}
