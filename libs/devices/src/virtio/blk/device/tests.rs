use super::super::MAX_REQUEST_BYTES;
use super::*;
use crate::pci::PciFunction;
use crate::testkit::driver::{Driver, Part, QUEUE_SIZE};
use crate::testkit::virtio as virtio_contract;
use crate::virtio::Segment;
use crate::GuestMemory;
use ovms_disk::{Stack, StackFiles, Table, Top, TopFiles};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

const DISK: u64 = 8 << 20;

fn memfile() -> File {
    tempfile::tempfile().unwrap()
}

/// A real block stack: no layers, an empty top.
fn stack(read_only: bool) -> Arc<Stack> {
    let table = memfile();
    Table::empty(DISK).unwrap().write_to(&table).unwrap();
    let top = TopFiles { data: memfile(), map: memfile() };
    Top::create(&top.data, &top.map, DISK).unwrap();
    let files = StackFiles { table, layers: vec![], frozen: vec![], top: Some(top) };
    Arc::new(Stack::open(files, read_only).unwrap())
}

fn options(queues: u16) -> BlockOptions {
    BlockOptions { queues, serial: "ovms-disk-0".into() }
}

fn block(queues: u16) -> Arc<Block> {
    Block::new(stack(false), &options(queues), &Spawner::default()).unwrap()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Sends a request with data; returns the status byte and what was read.
fn io(driver: &mut Driver, kind: u32, sector: u64, out: &[u8], room: u32) -> (u8, Vec<u8>) {
    let header = header(kind, sector);
    let mut parts = vec![Part::Out(&header)];
    if !out.is_empty() {
        parts.push(Part::Out(out));
    }
    if room > 0 {
        parts.push(Part::In(room));
    }
    parts.push(Part::In(1));
    let (_, mut answers) = driver.request(0, &parts);
    let status = answers.pop().unwrap()[0];
    (status, answers.pop().unwrap_or_default())
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn data_written_is_read_back() {
    let mut driver = Driver::ready(block(1), 0);
    let data: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(io(&mut driver, 1, 7, &data, 0).0, 0);
    assert_eq!(io(&mut driver, 4, 0, &[], 0).0, 0);
    assert_eq!(io(&mut driver, 0, 7, &[], 8192), (0, data));
    assert_eq!(io(&mut driver, 0, 100, &[], 512), (0, vec![0; 512]));
}

#[test]
fn every_queue_is_served() {
    let mut driver = Driver::ready(block(4), 0);
    for queue in 0..4 {
        let header = header(8, 0);
        let (used, answers) = driver.request(queue, &[Part::Out(&header), Part::In(20), Part::In(1)]);
        assert_eq!((used.len, &answers[0][..], answers[1][0]), (21, &b"ovms-disk-0\0\0\0\0\0\0\0\0\0"[..], 0));
    }
}

#[test]
fn header_and_status_may_be_split_any_way() {
    let mut driver = Driver::ready(block(1), 0);
    let header = header(0, 0);
    let parts =
        [Part::Out(&header[..3]), Part::Out(&header[3..9]), Part::Out(&header[9..]), Part::In(500), Part::In(13)];
    let (used, answers) = driver.request(0, &parts);
    assert_eq!((used.len, answers[1][12]), (513, 0));
}

#[test]
fn discard_and_write_zeroes_clear_ranges() {
    let mut driver = Driver::ready(block(1), 0);
    for (kind, flags) in [(11, 0), (13, 0), (13, 1)] {
        assert_eq!(io(&mut driver, 1, 0, &[7; 16384], 0).0, 0);
        let ranges = [range(0, 8, flags), range(16, 8, flags)].concat();
        assert_eq!(io(&mut driver, kind, 0, &ranges, 0).0, 0);
        let (_, data) = io(&mut driver, 0, 0, &[], 16384);
        let expected = [[0; 4096], [7; 4096], [0; 4096], [7; 4096]].concat();
        assert_eq!(data, expected, "{kind} {flags}");
    }
}

#[test]
fn bad_requests_get_an_error_and_the_device_goes_on() {
    let mut driver = Driver::ready(block(1), 0);
    let end = DISK / 512;
    let too_many = range(0, 1, 0).repeat(17);
    let cases: &[(u32, u64, &[u8], u32, u8)] = &[
        (0, end, &[], 512, 1),
        (0, u64::MAX, &[], 512, 1),
        (0, u64::MAX / 512, &[], 512, 1),
        (0, 0, &[], 100, 1),
        (0, 0, &[], 0, 1),
        (1, end - 1, &[0; 1024], 0, 1),
        (1, 0, &[0; 100], 0, 1),
        (2, 0, &[], 512, 2),
        (0xffff_ffff, 0, &[], 512, 2),
        (11, 0, &[0; 15], 0, 1),
        (11, 0, &range(0, 1, 1), 0, 2),
        (13, 0, &range(0, 1, 2), 0, 2),
        (11, 0, &range(end, 1, 0), 0, 1),
        (11, 0, &range(0, 0, 0), 0, 1),
        (11, 0, &range(0, MAX_RANGE_SECTORS + 1, 0), 0, 1),
        (13, 0, &too_many, 0, 1),
    ];
    for (kind, sector, out, room, status) in cases {
        assert_eq!(io(&mut driver, *kind, *sector, out, *room).0, *status, "{kind} {sector:#x} {}", out.len());
    }
    assert_eq!(io(&mut driver, 0, 0, &[], 512).0, 0);
}

#[test]
fn request_without_room_for_its_status_needs_reset() {
    let mut driver = Driver::ready(block(1), 0);
    let (head, _) = driver.prepare(0, &[Part::Out(&header(0, 0))]);
    driver.offer(0, head);
    assert!(driver.wait_for(Driver::broken));
    driver.start(0);
    assert_eq!(io(&mut driver, 0, 0, &[], 512).0, 0);
}

#[test]
fn read_only_disk_says_so_and_refuses_writes() {
    let block = Block::new(stack(true), &options(1), &Spawner::default()).unwrap();
    assert_eq!(block.features() & (READ_ONLY | WRITABLE), READ_ONLY);
    let mut driver = Driver::ready(block, 0);
    for (kind, out) in [(1, vec![1; 512]), (11, range(0, 8, 0)), (13, range(0, 8, 0))] {
        assert_eq!(io(&mut driver, kind, 0, &out, 0).0, 1);
    }
    assert_eq!(io(&mut driver, 0, 0, &[], 512), (0, vec![0; 512]));
}

#[test]
fn configuration_shows_capacity_and_limits() {
    let driver = Driver::ready(block(3), 0);
    assert_eq!(driver.read(0x2000, 8), DISK / 512);
    assert_eq!(driver.read(0x200c, 4), u64::from(SEG_MAX));
    assert_eq!(driver.read(0x2014, 4), 512);
    assert_eq!(driver.read(0x2022, 2), 3);
    assert_eq!(driver.read(0x2024, 4), u64::from(MAX_RANGE_SECTORS));
    assert_eq!(driver.read(0x2038, 1), 1);
    assert_eq!(driver.read(0x2100, 4), 0);
}

/// Lets requests through one by one, and counts.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
    entered: AtomicU32,
    left: AtomicU32,
    fail: AtomicBool,
    flushes: AtomicU32,
}

impl Gate {
    fn pass(&self) -> io::Result<()> {
        self.entered.fetch_add(1, Ordering::SeqCst);
        let open = self.open.lock().unwrap();
        drop(self.changed.wait_while(open, |open| !*open).unwrap());
        self.left.fetch_add(1, Ordering::SeqCst);
        match self.fail.load(Ordering::SeqCst) {
            true => Err(io::Error::other("the medium is gone")),
            false => Ok(()),
        }
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl BlockBackend for Gate {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(&self, _: u64, _: &GuestMemory, _: &[Segment]) -> io::Result<()> {
        self.pass()
    }
    fn write(&self, _: u64, _: &GuestMemory, _: &[Segment]) -> io::Result<()> {
        self.pass()
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn pause_returns_only_when_requests_in_flight_are_answered() {
    let gate = Arc::<Gate>::default();
    let mut driver = Driver::ready(Block::new(gate.clone(), &options(2), &Spawner::default()).unwrap(), 0);
    for queue in 0..2 {
        for _ in 0..3 {
            let (head, _) = driver.prepare(queue, &[Part::Out(&header(0, 0)), Part::In(512), Part::In(1)]);
            driver.offer(queue, head);
        }
    }
    assert!(driver.wait_for(|_| gate.entered.load(Ordering::SeqCst) == 2), "one request in flight per queue");
    let function = driver.function.clone();
    let pausing = std::thread::spawn(move || function.pause());
    std::thread::sleep(Duration::from_millis(30));
    assert!(!pausing.is_finished(), "the pause waits for the disk");
    gate.open();
    pausing.join().unwrap();
    let left = gate.left.load(Ordering::SeqCst);
    assert_eq!(gate.entered.load(Ordering::SeqCst), left);
    let answered: u32 = (0..2).map(|q| std::iter::from_fn(|| driver.poll_used(q)).count() as u32).sum();
    assert_eq!(answered, left, "all that was done is in the used rings");
    driver.function.resume();
    assert!(driver.wait_for(|_| gate.left.load(Ordering::SeqCst) == 6));
}

#[test]
fn hold_of_a_slow_disk_is_given_up_in_time_and_comes_true_later() {
    let gate = Arc::<Gate>::default();
    let mut driver = Driver::ready(Block::new(gate.clone(), &options(2), &Spawner::default()).unwrap(), 0);
    let (head, _) = driver.prepare(1, &[Part::Out(&header(0, 0)), Part::In(512), Part::In(1)]);
    driver.offer(1, head);
    assert!(driver.wait_for(|_| gate.entered.load(Ordering::SeqCst) == 1));
    let begin = Instant::now();
    assert!(!driver.function.hold(begin + Duration::from_millis(30)));
    assert!((30..5000).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    assert!(!driver.function.hold(Instant::now()), "nor does it wait again");
    // The other queue is held meanwhile.
    let (head, _) = driver.prepare(0, &[Part::Out(&header(0, 0)), Part::In(512), Part::In(1)]);
    driver.offer(0, head);
    // Whoever pauses it waits for it; who holds it does not, nor for the other.
    let function = driver.function.clone();
    let pausing = std::thread::spawn(move || function.pause());
    std::thread::sleep(Duration::from_millis(30));
    assert!(!driver.function.hold(Instant::now()) && !pausing.is_finished());
    assert_eq!(gate.entered.load(Ordering::SeqCst), 1);
    gate.open();
    assert!(driver.function.hold(Instant::now() + Duration::from_secs(60)));
    pausing.join().unwrap();
    assert_eq!((gate.entered.load(Ordering::SeqCst), gate.left.load(Ordering::SeqCst)), (1, 1));
    driver.function.resume();
    assert!(driver.wait_for(|_| gate.left.load(Ordering::SeqCst) == 2), "a hold that was given up leaves no trace");
    assert!(driver.function.hold(Instant::now() + Duration::from_secs(60)));
}

#[test]
fn hold_waits_for_no_idle_disk_and_until_a_reset_is_through() {
    let gate = Arc::<Gate>::default();
    let mut driver = Driver::ready(Block::new(gate.clone(), &options(1), &Spawner::default()).unwrap(), 0);
    let idle = Block::new(gate.clone(), &options(1), &Spawner::default()).unwrap();
    assert!(idle.hold(Instant::now()), "a disk without a driver stands at once");
    let (head, _) = driver.prepare(0, &[Part::Out(&header(0, 0)), Part::In(512), Part::In(1)]);
    driver.offer(0, head);
    assert!(driver.wait_for(|_| gate.entered.load(Ordering::SeqCst) == 1));
    let function = driver.function.clone();
    let resetting = std::thread::spawn(move || PciFunction::reset(function.as_ref()));
    std::thread::sleep(Duration::from_millis(30));
    assert!(!driver.function.hold(Instant::now() + Duration::from_millis(30)), "the request is still in flight");
    gate.open();
    resetting.join().unwrap();
    assert!(driver.function.hold(Instant::now()));
}

#[test]
fn backend_error_reaches_the_guest_as_a_status() {
    let gate = Arc::<Gate>::default();
    gate.open();
    gate.fail.store(true, Ordering::SeqCst);
    let mut driver = Driver::ready(Block::new(gate.clone(), &options(1), &Spawner::default()).unwrap(), 0);
    assert_eq!(io(&mut driver, 0, 0, &[], 512).0, 1);
    gate.fail.store(false, Ordering::SeqCst);
    assert_eq!(io(&mut driver, 0, 0, &[], 512).0, 0);
}

#[test]
fn write_is_durable_at_once_for_a_driver_without_flush() {
    for (without, flushes) in [(FLUSH, 1), (0, 0)] {
        let gate = Arc::<Gate>::default();
        gate.open();
        let block = Block::new(gate.clone(), &options(1), &Spawner::default()).unwrap();
        let mut driver = Driver::ready(block, without);
        assert_eq!(io(&mut driver, 1, 0, &[0; 512], 0).0, 0);
        assert_eq!(gate.flushes.load(Ordering::SeqCst), flushes);
    }
}

#[test]
fn request_larger_than_the_limit_is_refused() {
    let gate = Arc::<Gate>::default();
    gate.open();
    let mut driver = Driver::ready(Block::new(gate.clone(), &options(1), &Spawner::default()).unwrap(), 0);
    let header_at = driver.buffer(16);
    vm_memory::Bytes::write_slice(driver.mem.as_ref(), &header(0, 0), vm_memory::GuestAddress(header_at)).unwrap();
    let status_at = driver.buffer(16);
    // The same four mebibytes again and again: 8 times is the limit, 9 times is too much.
    for (times, len, status) in [(8, MAX_REQUEST_BYTES as u32 + 1, 0), (9, 1, 1)] {
        let mut list = vec![(header_at, 16, 1)];
        list.extend(std::iter::repeat_n((8 << 20, 4 << 20, 3), times));
        list.push((status_at, 1, 2));
        for (index, (address, len, flags)) in (0u16..QUEUE_SIZE).zip(list) {
            let next = index + 1;
            driver.write_descriptor(
                driver.table(0),
                index,
                crate::testkit::driver::Descriptor { address, len, flags, next },
            );
        }
        driver.offer(0, 0);
        assert_eq!(driver.wait_used(0).unwrap().len, len);
        assert_eq!(driver.bytes(status_at, 1), [status]);
    }
    assert_eq!(gate.entered.load(Ordering::SeqCst), 1);
}

#[test]
fn restore_onto_a_smaller_disk_returns_invalid() {
    use ovms_state::{Persist, StateError};
    let grown = stack(false);
    grown.grow(DISK * 2).unwrap();
    let big = Block::new(grown, &options(1), &Spawner::default()).unwrap();
    assert!(matches!(block(1).restore(&big.save().unwrap()), Err(StateError::Invalid { .. })));
}

#[test]
fn contract_holds() {
    virtio_contract::device(|| block(2));
}

#[test]
fn what_a_disk_reads_into_memory_is_noted_for_a_snapshot() {
    let mut driver = Driver::ready(block(1), 0);
    let data = vec![7; 256 << 10];
    assert_eq!(io(&mut driver, 1, 0, &data, 0).0, 0);
    let header = header(0, 0);
    let (changed, lacking) = driver.unnoted(0, &[Part::Out(&header), Part::In(256 << 10), Part::In(1)]);
    assert!(changed >= 5, "{changed}: the data, and the used ring");
    assert!(lacking.is_empty(), "{lacking:?}");
}
