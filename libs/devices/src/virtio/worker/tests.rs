use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::handle::Bell;
use super::thread::wait;
use super::*;
use crate::console::InputQueue;
use crate::poll::{wait_fds, Interest};
use crate::sync::lock;
use crate::testkit::driver::{guest_memory, Driver, Part};
use crate::testkit::{on_thread, GatedSink};
use crate::threads::{Spawner, ThreadKind};
use crate::virtio::balloon::Balloon;
use crate::virtio::console::Console;
use crate::virtio::rng::Rng;
use crate::virtio::{ActivateError, ActiveState, MemoryDiscard, VirtioInterrupt};

#[derive(Default)]
struct Told(AtomicUsize);

impl VirtioInterrupt for Told {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// What a driver without queues hands over; a worker is woken once when it begins to serve.
fn no_queues(interrupt: &Arc<Told>) -> ActiveState {
    ActiveState { mem: guest_memory(), queues: Vec::new(), features: 0, interrupt: Arc::clone(interrupt) as _ }
}

/// Counts its turns and always wants another.
#[derive(Clone, Default)]
struct Greedy {
    turns: Arc<AtomicUsize>,
    /// Holds on to its turn until a command comes.
    until_hurry: bool,
}

impl Greedy {
    fn turns(&self) -> usize {
        self.turns.load(Ordering::SeqCst)
    }

    fn wait_for_turn(&self, before: usize) {
        let start = Instant::now();
        while self.turns() == before {
            assert!(start.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
    }
}

impl QueueWorker for Greedy {
    fn serve(&mut self, _queues: &mut [VirtQueue], _at: usize, _hurry: &AtomicBool) -> Result<Turn, QueueError> {
        Ok(Turn::Idle)
    }

    fn woken(&mut self, _queues: &mut [VirtQueue], hurry: &AtomicBool) -> Result<Turn, QueueError> {
        self.turns.fetch_add(1, Ordering::SeqCst);
        while self.until_hurry && !hurry.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        Ok(Turn::More)
    }
}

fn start(thread: WorkerThread) {
    thread.spawn(&Spawner::default(), ThreadKind::Device, "virtio").unwrap();
}

#[test]
fn panic_of_one_device_leaves_the_others_serving() {
    struct Defect;
    impl MemoryDiscard for Defect {
        fn discard(&self, _address: u64, _len: u64) {
            panic!("a defect of ours");
        }
    }
    let (balloon, rng) = on_thread(|thread| (Balloon::new(Arc::new(Defect), thread).unwrap(), Rng::new(thread)));
    let (mut balloon, mut rng) = (Driver::ready(balloon, 0), Driver::ready(rng, 0));
    let (head, _) = balloon.prepare(0, &[Part::Out(&5u32.to_le_bytes())]);
    balloon.offer(0, head);
    assert!(balloon.wait_for(Driver::broken));
    assert_eq!(rng.request(0, &[Part::In(16)]).0.len, 16);
    balloon.function.pause();
    assert!(balloon.function.hold(Instant::now()));
    balloon.function.resume();
    balloon.write(0x14, 1, 0);
    assert_eq!(balloon.status(), 0);
    drop(balloon);
    rng.start(0);
    assert_eq!(rng.request(0, &[Part::In(16)]).0.len, 16);
}

#[test]
fn full_console_holds_up_no_entropy() {
    let (input, sink) = (Arc::<InputQueue>::default(), Arc::<GatedSink>::default());
    let devices = |thread: &mut WorkerThread| (Console::new(input, sink.clone(), thread).unwrap(), Rng::new(thread));
    let (console, rng) = on_thread(devices);
    let (mut console, mut rng) = (Driver::ready(console, 0), Driver::ready(rng, 0));
    let (head, _) = console.prepare(1, &[Part::Out(b"unheard")]);
    console.offer(1, head);
    assert_eq!(rng.request(0, &[Part::In(16)]).0.len, 16);
    assert_eq!(console.poll_used(1), None);
    sink.open();
    assert_eq!(console.wait_used(1).unwrap().head, head);
}

#[test]
fn inflating_balloon_leaves_turns_to_the_others_between_its_requests() {
    struct Gated(Mutex<Receiver<()>>);
    impl MemoryDiscard for Gated {
        fn discard(&self, _address: u64, _len: u64) {
            let _ = lock(&self.0).recv();
        }
    }
    let (gate, gated) = channel();
    let gated = Arc::new(Gated(Mutex::new(gated)));
    let (balloon, rng) = on_thread(|thread| (Balloon::new(gated, thread).unwrap(), Rng::new(thread)));
    let (mut balloon, mut rng) = (Driver::ready(balloon, 0), Driver::ready(rng, 0));
    // Dropped before the devices, so that a failed test ends.
    let gate = gate;
    for _ in 0..3 {
        let (head, _) = balloon.prepare(0, &[Part::Out(&5u32.to_le_bytes())]);
        balloon.offer_quietly(0, head);
    }
    balloon.kick(0);
    let (head, _) = rng.prepare(0, &[Part::In(16)]);
    rng.offer(0, head);
    // It may have its turn before entropy has one, but not two.
    gate.send(()).unwrap();
    gate.send(()).unwrap();
    assert!(rng.wait_used(0).is_some());
    drop(gate);
    for _ in 0..3 {
        assert!(balloon.wait_used(0).is_some());
    }
}

#[test]
fn worker_that_always_wants_more_leaves_turns_to_the_others() {
    let greedy = Greedy::default();
    let (worker, rng) = on_thread(|thread| (thread.add(greedy.clone()), Rng::new(thread)));
    let mut rng = Driver::ready(rng, 0);
    worker.activate(no_queues(&Arc::default())).unwrap();
    for _ in 0..100 {
        assert_eq!(rng.request(0, &[Part::In(16)]).0.len, 16);
    }
    greedy.wait_for_turn(greedy.turns());
}

#[test]
fn command_for_one_worker_cuts_the_turn_of_another_short() {
    let busy = Greedy { until_hurry: true, ..Greedy::default() };
    let (worker, other) = on_thread(|thread| (thread.add(busy.clone()), thread.add(Greedy::default())));
    let told = Arc::<Told>::default();
    worker.activate(no_queues(&told)).unwrap();
    busy.wait_for_turn(0);
    for _ in 0..20 {
        let before = busy.turns();
        // Each of these would wait for ever.
        other.activate(no_queues(&told)).unwrap();
        assert!(other.hold(Instant::now() + Duration::from_secs(30)));
        other.pause();
        other.resume();
        other.reset();
        busy.wait_for_turn(before);
    }
    let before = busy.turns();
    drop(other);
    busy.wait_for_turn(before);
    drop(worker);
    assert_eq!(told.0.load(Ordering::SeqCst), 0, "none of them died");
}

#[test]
fn bell_that_was_answered_while_it_was_rung_wakes_once() {
    let bell = Bell::new().unwrap();
    bell.hurry.store(true, Ordering::Release);
    assert!(bell.answer());
    bell.wake.write(1).unwrap();
    wait(&bell, &mut []).unwrap();
    assert_eq!(wait_fds(&[(&bell.wake, Interest::Read)], Some(Duration::ZERO)).unwrap(), [false]);
}

#[test]
fn hold_of_one_worker_leaves_the_others_serving() {
    let greedy = Greedy::default();
    let (held, other) = on_thread(|thread| (thread.add(greedy.clone()), thread.add(Greedy::default())));
    held.activate(no_queues(&Arc::default())).unwrap();
    other.activate(no_queues(&Arc::default())).unwrap();
    assert!(other.hold(Instant::now() + Duration::from_secs(30)));
    greedy.wait_for_turn(greedy.turns());
    held.pause();
    let still = greedy.turns();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(greedy.turns(), still);
    held.resume();
    greedy.wait_for_turn(still);
}

#[test]
fn workers_end_in_whatever_order_their_handles_go() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for active in [0, 1, 3] {
            let works: Vec<Greedy> = (0..3).map(|_| Greedy::default()).collect();
            let add = |thread: &mut WorkerThread| works.iter().map(|work| Some(thread.add(work.clone()))).collect();
            let mut workers: Vec<Option<Worker>> = on_thread(add);
            for worker in workers.iter().take(active).flatten() {
                worker.activate(no_queues(&Arc::default())).unwrap();
            }
            for at in order {
                workers[at] = None;
                assert_eq!(Arc::strong_count(&works[at].turns), 1, "{order:?}: nothing is left of {at}");
            }
        }
    }
}

#[test]
fn handle_that_goes_before_the_thread_begins_is_not_waited_for() {
    let (early, late) = (Greedy::default(), Greedy::default());
    let mut thread = WorkerThread::new().unwrap();
    drop(thread.add(early.clone()));
    let worker = thread.add(late.clone());
    start(thread);
    worker.activate(no_queues(&Arc::default())).unwrap();
    late.wait_for_turn(0);
    assert_eq!((early.turns(), Arc::strong_count(&early.turns)), (0, 1));
    let mut thread = WorkerThread::new().unwrap();
    drop(thread.add(early.clone()));
    start(thread);
    assert_eq!(Arc::strong_count(&early.turns), 1, "the thread had nobody to serve, and has ended");
}

#[test]
fn worker_whose_thread_never_begins_returns_worker_gone_and_blocks_nobody() {
    let told = Arc::<Told>::default();
    let check = |worker: &Worker| {
        assert!(matches!(worker.activate(no_queues(&told)), Err(ActivateError::WorkerGone)));
        assert!(worker.hold(Instant::now()) && worker.pause().is_empty());
        worker.resume();
        worker.reset();
    };
    let mut thread = WorkerThread::new().unwrap();
    let workers = [thread.add(Greedy::default()), thread.add(Greedy::default())];
    workers.iter().for_each(check);
    drop(thread);
    workers.iter().for_each(check);
    drop(workers);
    let mut thread = WorkerThread::new().unwrap();
    let worker = thread.add(Greedy::default());
    thread.spawn(&Spawner::new(|_| panic!("no filter")), ThreadKind::Device, "virtio").unwrap();
    check(&worker);
}

#[test]
fn pause_before_the_thread_begins_holds() {
    let work = Greedy::default();
    let mut thread = WorkerThread::new().unwrap();
    let worker = thread.add(work.clone());
    worker.pause();
    start(thread);
    worker.activate(no_queues(&Arc::default())).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(work.turns(), 0);
    worker.resume();
    work.wait_for_turn(0);
}
