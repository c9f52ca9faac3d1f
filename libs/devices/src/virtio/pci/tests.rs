use super::*;
use crate::testkit::driver::{Driver, Part, QUEUE_SIZE};
use crate::testkit::virtio as virtio_contract;
use crate::threads::{Spawner, ThreadKind};
use crate::virtio::queue::{copy_from, copy_to, total, QueueError, Turn, VirtQueue};
use crate::virtio::worker::{QueueWorker, Worker};
use ovms_state::{Persist, Section, StateError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Copies what it reads into what it may write.
struct Echo {
    worker: Worker,
}

struct EchoWorker;

/// What a request says to make the worker panic.
const POISON: &[u8] = b"a defect of ours";

impl QueueWorker for EchoWorker {
    fn serve(&mut self, queues: &mut [VirtQueue], at: usize, hurry: &AtomicBool) -> Result<Turn, QueueError> {
        queues[at].serve(
            || hurry.load(Ordering::Relaxed),
            |mem, request| {
                let mut data = vec![0; total(&request.readable).min(4096) as usize];
                copy_from(mem, &request.readable, 0, &mut data);
                assert_ne!(data, POISON);
                Ok(copy_to(mem, &request.writable, 0, &data) as u32)
            },
        )
    }
}

impl Echo {
    fn new() -> Arc<Self> {
        Arc::new(Self { worker: Worker::spawn(&Spawner::default(), ThreadKind::Device, "echo", EchoWorker).unwrap() })
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        60
    }
    fn features(&self) -> u64 {
        0b10
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&self, _offset: u64, _data: &[u8]) {}
    fn activate(&self, state: ActiveState) -> Result<(), ActivateError> {
        self.worker.activate(state)
    }
    fn reset(&self) {
        self.worker.reset();
    }
    fn pause(&self) -> Vec<QueueProgress> {
        self.worker.pause()
    }
    fn hold(&self, until: Instant) -> bool {
        self.worker.hold(until)
    }
    fn resume(&self) {
        self.worker.resume();
    }
}

impl Persist for Echo {
    fn save(&self) -> Result<Section, StateError> {
        Section::encode("echo", 1, &())
    }
    fn restore(&self, section: &Section) -> Result<(), StateError> {
        section.decode("echo", 1)
    }
}

#[test]
fn requests_are_answered_with_an_interrupt_of_the_queue() {
    for without in [0, EVENT_IDX] {
        let mut driver = Driver::ready(Echo::new(), without);
        for round in 0..100u8 {
            let (used, answers) =
                driver.request(1, &[Part::Out(&[round; 5]), Part::Out(b"!"), Part::In(3), Part::In(9)]);
            assert_eq!(used.len, 6);
            assert_eq!(answers[0], [round; 3]);
            assert_eq!(answers[1][..3], [round, round, b'!']);
        }
        let messages = driver.interrupts.take();
        assert!(!messages.is_empty() && messages.iter().all(|m| m.data == 0x42), "{messages:?}");
    }
}

#[test]
fn many_requests_in_flight_are_all_answered() {
    let mut driver = Driver::ready(Echo::new(), 0);
    for _ in 0..50 {
        for _ in 0..QUEUE_SIZE / 2 {
            let (head, _) = driver.prepare(0, &[Part::Out(b"x"), Part::In(1)]);
            driver.offer_quietly(0, head);
        }
        driver.kick(0);
        for _ in 0..QUEUE_SIZE / 2 {
            assert_eq!(driver.wait_used(0).unwrap().len, 1);
        }
    }
}

#[test]
fn paused_device_answers_after_the_resume() {
    let mut driver = Driver::ready(Echo::new(), 0);
    driver.function.pause();
    let (head, _) = driver.prepare(0, &[Part::Out(b"x"), Part::In(1)]);
    driver.offer(0, head);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.poll_used(0), None);
    driver.function.resume();
    assert_eq!(driver.wait_used(0).unwrap().len, 1);
}

#[test]
fn restored_device_goes_on_where_it_was() {
    let mut driver = Driver::ready(Echo::new(), 0);
    for _ in 0..5 {
        driver.request(0, &[Part::Out(b"x"), Part::In(1)]);
    }
    driver.function.pause();
    let (head, _) = driver.prepare(0, &[Part::Out(b"yz"), Part::In(4)]);
    driver.offer(0, head);
    let saved = driver.function.save().unwrap();
    let (restored, log) = crate::testkit::driver::function(Echo::new(), driver.mem.clone());
    restored.restore(&saved).unwrap();
    restored.resume();
    driver.function = restored;
    assert_eq!(driver.wait_used(0).unwrap().len, 2);
    assert!(driver.wait_for(|_| !log.take().is_empty()), "interrupts go the new way");
    assert_eq!(driver.request(0, &[Part::Out(b"a"), Part::In(1)]).1[0], b"a");
}

#[test]
fn restored_transport_shows_the_same_registers() {
    let mut driver = Driver::ready(Echo::new(), 0);
    driver.request(1, &[Part::Out(b"x"), Part::In(1)]);
    for _ in 0..3 {
        driver.function.interrupt.config();
    }
    driver.write(0x16, 2, 1);
    driver.function.config_write(0x3c, &[0x5a]);
    let saved = driver.function.save().unwrap();
    let old = driver.function.clone();
    driver.function = crate::testkit::driver::function(Echo::new(), driver.mem.clone()).0;
    driver.function.restore(&saved).unwrap();
    assert_eq!(driver.read(0x15, 1), 3, "configuration generation");
    assert_eq!((driver.read(0x18, 2), driver.read(0x1a, 2)), (QUEUE_SIZE.into(), 2), "the selected queue");
    assert_eq!(driver.read(0x4020, 8), 0xfee0_0000, "vector table");
    assert_eq!(driver.read(0x1000, 1), 0b11, "ISR");
    let mut line = [0];
    driver.function.config_read(0x3c, &mut line);
    assert_eq!(line, [0x5a], "configuration space");
    driver.function.resume();
    drop(old);
}

#[test]
fn queue_outside_of_memory_needs_reset_and_the_next_start_works() {
    let mut driver = Driver::new(Echo::new());
    for (offset, len, value) in [
        (0x14, 1, 1),
        (0x14, 1, 3),
        (0x08, 4, 1),
        (0x0c, 4, 1),
        (0x14, 1, 11),
        (0x20, 8, 0x4000_0000),
        (0x1c, 2, 1),
        (0x14, 1, 15),
    ] {
        driver.write(offset, len, value);
    }
    assert!(driver.broken());
    driver.start(0);
    driver.request(0, &[Part::Out(b"x"), Part::In(1)]);
}

#[test]
fn broken_chain_needs_reset_and_the_next_start_works() {
    let mut driver = Driver::ready(Echo::new(), 0);
    for (name, chain) in virtio_contract::broken_chains() {
        virtio_contract::write_tables(&driver);
        for (index, descriptor) in (0..).zip(&chain) {
            driver.write_descriptor(driver.table(0), index, *descriptor);
        }
        driver.interrupts.take();
        driver.offer(0, 0);
        assert!(driver.wait_for(Driver::broken), "{name}");
        assert!(driver.wait_for(|d| d.interrupts.take().iter().any(|m| m.data == 0x40)), "{name}: the driver is told");
        driver.start(0);
        driver.request(0, &[Part::Out(b"x"), Part::In(1)]);
    }
}

#[test]
fn available_index_out_of_range_needs_reset() {
    let mut driver = Driver::ready(Echo::new(), 0);
    for index in [QUEUE_SIZE + 1, 0x8000, u16::MAX] {
        driver.set_avail_index(0, index);
        driver.kick(0);
        assert!(driver.wait_for(Driver::broken), "{index}");
        driver.start(0);
    }
}

#[test]
fn worker_that_panics_needs_reset_and_blocks_nobody() {
    let mut driver = Driver::ready(Echo::new(), 0);
    let (head, _) = driver.prepare(0, &[Part::Out(POISON), Part::In(1)]);
    driver.offer(0, head);
    assert!(driver.wait_for(Driver::broken));
    driver.function.pause();
    driver.function.resume();
    driver.write(0x14, 1, 0);
    assert_eq!(driver.status(), 0);
}

/// Every register, written in every status by every width: no write leads to a state that cannot be restored, and none
/// but a reset reaches a queue that is live.
#[test]
fn every_register_write_in_every_status_keeps_live_queues_alive() {
    let mut driver = Driver::new(Echo::new());
    let values = [0, 1, 2, 0x80, 0xff, 0x100, 0xffff, 0x1000, u64::MAX];
    let steps: [&[u8]; 6] = [&[], &[1], &[1, 3], &[1, 3, 11], &[1, 3, 0x83], &[]];
    for (case, steps) in steps.iter().enumerate() {
        let live = case == 5;
        for offset in 0..0x40 {
            for (width, value) in [1, 2, 4, 8].into_iter().flat_map(|width| values.map(|value| (width, value))) {
                driver.write(0x14, 1, 0);
                if live {
                    driver.start(0);
                }
                for status in *steps {
                    driver.write(0x14, 1, (*status).into());
                }
                driver.write(offset, width, value);
                let common = lock(&driver.function.common).clone();
                assert_eq!(common.check(&driver.function.limits), Ok(()), "{case} {offset:#x} {width} {value:#x}");
                let reset = offset == 0x14 && width == 1 && value as u8 == 0;
                if live && !reset {
                    let used = driver.request(0, &[Part::Out(b"x"), Part::In(1)]).0;
                    assert_eq!(used.len, 1, "{offset:#x} {width} {value:#x}");
                }
            }
        }
    }
}

#[test]
fn writes_to_a_live_queue_change_nothing() {
    let mut driver = Driver::ready(Echo::new(), 0);
    driver.write(0x16, 2, 0);
    for (offset, len, value) in [(0x18, 2, 4), (0x20, 8, 0), (0x28, 8, 0), (0x30, 8, 0), (0x1c, 2, 0), (0x0c, 4, 0)] {
        let before = driver.read(offset, len);
        driver.write(offset, len, value);
        assert_eq!(driver.read(offset, len), before, "{offset:#x}");
    }
    driver.request(0, &[Part::Out(b"x"), Part::In(1)]);
}

#[test]
fn window_capability_reaches_the_bar() {
    let driver = Driver::ready(Echo::new(), 0);
    let at = driver.function.capabilities.window as u16;
    driver.function.config_write(at + 8, &0x14u32.to_le_bytes());
    driver.function.config_write(at + 12, &1u32.to_le_bytes());
    let mut status = [0];
    driver.function.config_read(at + 16, &mut status);
    assert_eq!(status, [15]);
    driver.function.config_write(at + 16, &[0]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn notifiers_lie_where_the_capability_says() {
    let driver = Driver::new(Echo::new());
    let offsets: Vec<u64> = driver.function.notifiers().iter().map(|(offset, _)| *offset).collect();
    assert_eq!(offsets, [0x3000, 0x3004]);
    driver.kick(1);
    let fds = driver.function.notifiers();
    assert_eq!(fds[1].1.read().unwrap(), 1);
    assert!(fds[0].1.read().is_err());
}

#[test]
fn restore_of_impossible_states_is_refused_and_changes_nothing() {
    use serde_json::{json, Value};
    let mut driver = Driver::ready(Echo::new(), 0);
    driver.request(0, &[Part::Out(b"x"), Part::In(1)]);
    let good = driver.function.save().unwrap();
    let cases: &[(&str, Value)] = &[
        ("/config/bytes/0", json!(0)),
        ("/config/bytes/255", json!(1)),
        ("/config/bytes", json!([0, 1])),
        ("/msix/control", json!(0x8001)),
        ("/msix/entries/0/pending", json!(true)),
        ("/msix/entries/0/address", json!(0xfee0_0001u32)),
        ("/msix/entries/0/control", json!(2)),
        ("/msix/entries", json!([])),
        ("/common/status", json!(0x10)),
        ("/common/status", json!(4)),
        ("/common/status", json!(0x4f)),
        ("/common/driver_features", json!(0)),
        ("/common/driver_features", json!(u64::MAX)),
        ("/common/config_vector", json!(3)),
        ("/common/queues", json!([])),
        ("/common/queues/0/size", json!(0)),
        ("/common/queues/0/size", json!(3)),
        ("/common/queues/1/size", json!(128)),
        ("/common/queues/0/vector", json!(3)),
        ("/common/queues/0/desc", json!(0x40_0000 - 16)),
        ("/common/queues/0/driver", json!(u64::MAX - 1)),
        ("/common/queues/0/device", json!(0x1_0002)),
        ("/isr", json!(4)),
        ("/device/kind", json!("other")),
        ("/device/version", json!(9)),
    ];
    let fresh = crate::testkit::driver::function(Echo::new(), driver.mem.clone()).0;
    let before = fresh.save().unwrap();
    for (pointer, value) in cases {
        let mut state: Value = serde_json::from_slice(&good.payload).unwrap();
        *state.pointer_mut(pointer).unwrap() = value.clone();
        let bad = Section { payload: serde_json::to_vec(&state).unwrap(), ..good.clone() };
        assert!(fresh.restore(&bad).is_err(), "{pointer} = {value}");
        assert_eq!(fresh.save().unwrap(), before, "{pointer} = {value}");
    }
    fresh.restore(&good).unwrap();
    assert!(fresh.restore(&good).is_err(), "not over a driver that runs");
}

#[test]
fn restore_of_another_name_returns_wrong_kind() {
    let driver = Driver::ready(Echo::new(), 0);
    let mut section = driver.function.save().unwrap();
    section.kind = "virtio/1".into();
    let fresh = Driver::new(Echo::new());
    assert!(matches!(fresh.function.restore(&section), Err(StateError::WrongKind { .. })));
}

#[test]
fn contract_holds() {
    virtio_contract::device(Echo::new);
}
