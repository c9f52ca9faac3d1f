//! The device: its features and configuration space, and its workers.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::worker::{Receiver, Transmitter};
use crate::console::{ByteSink, InputQueue};
use crate::sync::lock;
use crate::virtio::worker::Worker;
use crate::virtio::{
    read_bytes, ActivateError, ActiveState, ConfigNotifier, QueueProgress, VirtioDevice, WorkerThread, TYPE_CONSOLE,
};

const SIZES: [u16; 2] = [256, 256];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// VIRTIO_CONSOLE_F_SIZE and VIRTIO_CONSOLE_F_EMERG_WRITE (virtio 1.2, 5.3.3).
const FEATURES: u64 = (1 << 0) | (1 << 2);
/// Offset of the emergency write register in `struct virtio_console_config`.
const EMERGENCY_WRITE: u64 = 8;

/// Columns and rows of the terminal at the host's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: u16,
    pub(super) rows: u16,
}

/// A console.
pub struct Console {
    pub(super) input: Arc<InputQueue>,
    pub(super) size: Mutex<Size>,
    sink: Arc<dyn ByteSink>,
    receiver: Worker,
    transmitter: Worker,
    notifier: ConfigNotifier,
}

impl Console {
    /// A console between `input` and `sink` that `thread` will serve. Its size is 0 by 0, "unknown".
    ///
    /// # Errors
    /// The system has no eventfds to give.
    pub fn new(input: Arc<InputQueue>, sink: Arc<dyn ByteSink>, thread: &mut WorkerThread) -> io::Result<Arc<Self>> {
        let (data, room) = (doorbell()?, doorbell()?);
        let (on_data, on_room) = (Arc::clone(&data), Arc::clone(&room));
        input.on_data(move || {
            let _ = on_data.write(1);
        });
        sink.on_room(Box::new(move || {
            let _ = on_room.write(1);
        }));
        let receiver = thread.add(Receiver { input: Arc::clone(&input), data });
        let transmitter = thread.add(Transmitter { sink: Arc::clone(&sink), room });
        let (size, notifier) = (Mutex::default(), ConfigNotifier::default());
        Ok(Arc::new(Self { input, size, sink, receiver, transmitter, notifier }))
    }

    /// The terminal at the host's end has another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        let new = Size { columns, rows };
        let old = std::mem::replace(&mut *lock(&self.size), new);
        if old != new {
            self.notifier.notify();
        }
    }
}

fn doorbell() -> io::Result<Arc<EventFd>> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new)
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        TYPE_CONSOLE
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = *lock(&self.size);
        let mut config = size.columns.to_le_bytes().to_vec();
        config.extend(size.rows.to_le_bytes());
        // One port; the emergency register reads as zero.
        config.extend(1u32.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (EMERGENCY_WRITE, Some(byte)) = (offset, data.first()) {
            self.sink.push(&[*byte]);
        }
    }

    fn activate(&self, state: ActiveState) -> Result<(), ActivateError> {
        let missing = [RECEIVE, TRANSMIT].into_iter().find(|index| !state.queues.iter().any(|q| q.index == *index));
        if let Some(index) = missing {
            return Err(ActivateError::MissingQueue(index));
        }
        self.notifier.set(Arc::clone(&state.interrupt));
        for queue in state.queues {
            let worker = if queue.index == RECEIVE { &self.receiver } else { &self.transmitter };
            worker.activate(ActiveState {
                mem: Arc::clone(&state.mem),
                queues: vec![queue],
                features: state.features,
                interrupt: Arc::clone(&state.interrupt),
            })?;
        }
        Ok(())
    }

    fn reset(&self) {
        self.notifier.clear();
        self.receiver.reset();
        self.transmitter.reset();
    }

    fn pause(&self) -> Vec<QueueProgress> {
        let mut progress = self.receiver.pause();
        progress.extend(self.transmitter.pause());
        progress
    }

    fn hold(&self, until: Instant) -> bool {
        let received = self.receiver.hold(until);
        self.transmitter.hold(until) && received
    }

    fn resume(&self) {
        self.receiver.resume();
        self.transmitter.resume();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Writer;
    use crate::testkit::driver::{Driver, Part, QUEUE_SIZE};
    use crate::testkit::{on_thread, virtio as virtio_contract, GatedSink, RecordingSink};
    use crate::threads::Spawner;
    use std::io::Read;
    use std::time::{Duration, Instant};

    fn console() -> (Arc<Console>, Arc<InputQueue>, Arc<RecordingSink>) {
        let (input, sink) = (Arc::<InputQueue>::default(), Arc::<RecordingSink>::default());
        (on_thread(|thread| Console::new(input.clone(), sink.clone(), thread).unwrap()), input, sink)
    }

    #[test]
    fn output_reaches_the_sink_in_order() {
        let (console, _, sink) = console();
        let mut driver = Driver::ready(console, 0);
        let long = vec![b'z'; 10_000];
        driver.request(1, &[Part::Out(b"hello, "), Part::Out(b"world\n")]);
        driver.request(1, &[Part::Out(&long)]);
        assert_eq!(sink.bytes(), [b"hello, world\n", &long[..]].concat());
    }

    #[test]
    fn input_before_and_after_the_buffers_reaches_the_guest() {
        let (console, input, _) = console();
        input.push(b"early");
        let mut driver = Driver::ready(console, 0);
        let (used, answers) = driver.request(0, &[Part::In(64)]);
        assert_eq!(&answers[0][..used.len as usize], b"early");
        let (head, places) = driver.prepare(0, &[Part::In(64)]);
        driver.offer(0, head);
        driver.function.pause();
        driver.function.resume();
        assert_eq!(driver.poll_used(0), None, "a buffer waits until there is input");
        input.push(b"late");
        let used = driver.wait_used(0).unwrap();
        assert_eq!(driver.bytes(places[0], used.len), b"late");
    }

    #[test]
    fn input_longer_than_a_buffer_takes_several() {
        let (console, input, _) = console();
        let mut driver = Driver::ready(console, 0);
        let mut places = Vec::new();
        for _ in 0..QUEUE_SIZE {
            let (head, place) = driver.prepare(0, &[Part::In(3)]);
            places.push(place[0]);
            driver.offer_quietly(0, head);
        }
        driver.kick(0);
        input.push(b"0123456789");
        let mut got = Vec::new();
        while got.len() < 10 {
            let used = driver.wait_used(0).unwrap();
            got.extend(driver.bytes(places.remove(0), used.len));
        }
        assert_eq!(got, b"0123456789");
    }

    #[test]
    fn full_sink_holds_output_back_but_neither_input_nor_pause() {
        let (input, sink) = (Arc::<InputQueue>::default(), Arc::<GatedSink>::default());
        let console = on_thread(|thread| Console::new(input.clone(), sink.clone(), thread).unwrap());
        let mut driver = Driver::ready(console, 0);
        let (head, _) = driver.prepare(1, &[Part::Out(b"x")]);
        driver.offer(1, head);
        input.push(b"^C");
        let (used, _) = driver.request(0, &[Part::In(8)]);
        assert_eq!(used.len, 2);
        let start = Instant::now();
        driver.function.pause();
        driver.function.resume();
        assert!(start.elapsed() < Duration::from_secs(2));
        assert!(sink.bytes().is_empty());
        sink.open();
        driver.wait_used(1).unwrap();
        assert_eq!(sink.bytes(), b"x");
    }

    #[test]
    fn flood_into_a_reader_that_comes_late_arrives_whole() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let sink = Arc::new(Writer::spawn(writer.into(), &Spawner::default()).unwrap());
        let console = on_thread(|thread| Console::new(Arc::default(), sink.clone(), thread).unwrap());
        let mut driver = Driver::ready(console, 0);
        let text: Vec<u8> = (0..4_000_000u32).map(|i| (i % 251) as u8).collect();
        let expected = text.clone();
        let reading = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            assert!(got == expected);
        });
        for chunk in text.chunks(61_000) {
            driver.request(1, &[Part::Out(chunk)]);
        }
        assert_eq!(sink.flush_and_close(Instant::now() + Duration::from_secs(30)), 0);
        drop((driver, sink));
        reading.join().unwrap();
    }

    #[test]
    fn resize_shows_the_size_and_interrupts() {
        let (console, ..) = console();
        let driver = Driver::ready(console.clone(), 0);
        console.resize(132, 43);
        assert_eq!((driver.read(0x2000, 2), driver.read(0x2002, 2)), (132, 43));
        assert_eq!(driver.interrupts.take()[0].data, 0x40);
        console.resize(132, 43);
        assert!(driver.interrupts.take().is_empty());
    }

    #[test]
    fn emergency_write_prints_without_queues() {
        let (console, _, sink) = console();
        let driver = Driver::new(console);
        for byte in b"oops" {
            driver.write(0x2008, 4, (*byte).into());
        }
        assert_eq!(sink.bytes(), b"oops");
    }

    #[test]
    fn input_is_noted_for_a_snapshot() {
        let (console, input, _) = console();
        let mut driver = Driver::ready(console, 0);
        input.push(b"typed");
        let (changed, lacking) = driver.unnoted(0, &[Part::In(64)]);
        assert!(changed >= 2 && lacking.is_empty(), "{changed} {lacking:?}");
    }

    #[test]
    fn contract_holds() {
        virtio_contract::device(|| {
            let (console, input, _) = console();
            input.push(&[b'i'; 100]);
            console
        });
    }
}
