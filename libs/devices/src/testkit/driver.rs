//! A fake guest driver: negotiates and drives a virtio device through the registers of its PCI function, with rings in
//! real guest memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test suite"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::MsiLog;
use crate::dirty::GRAIN;
use crate::pci::{MsiNotifier, PciFunction};
use crate::virtio::pci::{VirtioPci, NOTIFY_OFFSET, NOTIFY_STRIDE};
use crate::virtio::VirtioDevice;
use crate::GuestMemory;

/// How long a device may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Entries of each queue that the driver sets up.
pub const QUEUE_SIZE: u16 = 16;
/// Where the rings lie, one queue after the other.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where the buffers lie.
const BUFFERS: u64 = 0x20_0000;
const BUFFERS_END: u64 = 0x40_0000;
/// Where indirect tables lie.
pub const INDIRECT: u64 = 0x18_0000;

const BAR: u64 = 0xe000_0000;

/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT_TABLE: u16 = 4;

/// 4 MiB at 0 and 4 MiB behind a hole.
pub fn guest_memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20), (GuestAddress(8 << 20), 4 << 20)]).unwrap())
}

/// A device behind its transport, with a log of its interrupts.
pub fn function(device: Arc<dyn VirtioDevice>, mem: Arc<GuestMemory>) -> (Arc<VirtioPci>, Arc<MsiLog>) {
    let log = Arc::<MsiLog>::default();
    let notifier = Arc::new(MsiNotifier::new(log.clone()));
    (VirtioPci::new("virtio/0", device, mem, BAR, notifier).unwrap(), log)
}

/// One raw descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT_TABLE`].
    pub flags: u16,
    /// The next one.
    pub next: u16,
}

/// A part of a request.
pub enum Part<'a> {
    /// The device reads these bytes.
    Out(&'a [u8]),
    /// The device writes at most so many bytes.
    In(u32),
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    /// The head that was handed back.
    pub head: u16,
    /// How many bytes the device says that it wrote.
    pub len: u32,
}

/// The driver.
pub struct Driver {
    /// The device's function.
    pub function: Arc<VirtioPci>,
    /// Guest memory.
    pub mem: Arc<GuestMemory>,
    /// Its interrupts.
    pub interrupts: Arc<MsiLog>,
    next_buffer: u64,
    next_descriptor: Vec<u16>,
    avail: Vec<u16>,
    used: Vec<u16>,
}

impl Driver {
    /// A driver for `device`, which does nothing yet.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        Self::over(device, guest_memory())
    }

    /// As [`Driver::new`], over memory that is there already.
    pub fn over(device: Arc<dyn VirtioDevice>, mem: Arc<GuestMemory>) -> Self {
        let queues = device.queue_max_sizes().len();
        let (function, interrupts) = function(device, mem.clone());
        Self {
            function,
            mem,
            interrupts,
            next_buffer: BUFFERS,
            next_descriptor: vec![0; queues],
            avail: vec![0; queues],
            used: vec![0; queues],
        }
    }

    /// A driver that has set the device up with every feature it offers but those in `without`.
    pub fn ready(device: Arc<dyn VirtioDevice>, without: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(without);
        driver
    }

    /// Loads a register of BAR 0.
    pub fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// Stores a register of BAR 0.
    pub fn write(&self, offset: u64, len: usize, value: u64) {
        self.function.bar_write(0, offset, &value.to_le_bytes()[..len]);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.read(0x14, 1) as u8
    }

    /// Resets the device, negotiates, enables MSI-X and every queue, and sets DRIVER_OK.
    pub fn start(&mut self, without: u64) {
        self.write(0x14, 1, 0);
        assert_eq!(self.status(), 0, "reset");
        for values in [&mut self.next_descriptor, &mut self.avail, &mut self.used] {
            values.fill(0);
        }
        self.enable_msix();
        self.write(0x14, 1, 1);
        self.write(0x14, 1, 3);
        for half in 0..2 {
            self.write(0x00, 4, half);
            let offered = self.read(0x04, 4);
            self.write(0x08, 4, half);
            self.write(0x0c, 4, offered & !(without >> (32 * half)));
        }
        self.write(0x14, 1, 11);
        assert_eq!(self.status(), 11, "features accepted");
        for queue in 0..self.avail.len() as u64 {
            self.write(0x16, 2, queue);
            let rings = ring(queue as u16);
            self.mem.write_slice(&[0; RING_STRIDE as usize], GuestAddress(rings)).unwrap();
            self.write(0x18, 2, u64::from(QUEUE_SIZE).min(self.read(0x18, 2)));
            self.write(0x1a, 2, queue + 1);
            self.write(0x20, 8, rings);
            self.write(0x28, 8, rings + AVAIL);
            self.write(0x30, 8, rings + USED);
            self.write(0x1c, 2, 1);
        }
        self.write(0x10, 2, 0);
        self.write(0x14, 1, 15);
        assert_eq!(self.status(), 15, "running");
    }

    fn enable_msix(&self) {
        for vector in 0..=self.avail.len() as u64 {
            self.write(0x4000 + vector * 16, 8, 0xfee0_0000);
            self.write(0x4000 + vector * 16 + 8, 8, 0x40 + vector);
        }
        let mut pointer = [0];
        self.function.config_read(0x34, &mut pointer);
        while pointer[0] != 0 {
            let mut header = [0; 2];
            self.function.config_read(pointer[0].into(), &mut header);
            if header[0] == 0x11 {
                self.function.config_write(u16::from(pointer[0]) + 2, &0x8000u16.to_le_bytes());
                return;
            }
            pointer = [header[1]];
        }
        panic!("no MSI-X capability");
    }

    /// Writes one descriptor of the table at `table`.
    pub fn write_descriptor(&self, table: u64, index: u16, d: Descriptor) {
        let mut bytes = d.address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&d.len.to_le_bytes());
        bytes.extend_from_slice(&d.flags.to_le_bytes());
        bytes.extend_from_slice(&d.next.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// The descriptor table of `queue`.
    pub fn table(&self, queue: u16) -> u64 {
        ring(queue)
    }

    /// Makes `head` available and kicks.
    pub fn offer(&mut self, queue: u16, head: u16) {
        self.offer_quietly(queue, head);
        self.kick(queue);
    }

    /// Makes `head` available.
    pub fn offer_quietly(&mut self, queue: u16, head: u16) {
        let avail = &mut self.avail[usize::from(queue)];
        let slot = ring(queue) + AVAIL + 4 + u64::from(*avail % QUEUE_SIZE) * 2;
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        *avail = avail.wrapping_add(1);
        let index = *avail;
        self.set_avail_index(queue, index);
    }

    /// Writes the index of the available ring as it is.
    pub fn set_avail_index(&mut self, queue: u16, index: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.mem.write_obj(index, GuestAddress(ring(queue) + AVAIL + 2)).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// Kicks a queue.
    pub fn kick(&self, queue: u16) {
        self.write(NOTIFY_OFFSET + u64::from(queue) * NOTIFY_STRIDE, 2, queue.into());
    }

    /// Room for `len` bytes in guest memory.
    pub fn buffer(&mut self, len: u32) -> u64 {
        let len = (u64::from(len) + 15) & !15;
        if self.next_buffer + len > BUFFERS_END {
            self.next_buffer = BUFFERS;
        }
        self.next_buffer += len;
        self.next_buffer - len
    }

    /// Lays a request out in the table without offering it; returns its head and where its parts lie.
    pub fn prepare(&mut self, queue: u16, parts: &[Part]) -> (u16, Vec<u64>) {
        let first = self.next_descriptor[usize::from(queue)];
        let mut places = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            let (len, mut flags) = match part {
                Part::Out(data) => (data.len() as u32, 0),
                Part::In(len) => (*len, WRITE),
            };
            let address = self.buffer(len);
            match part {
                Part::Out(data) => self.mem.write_slice(data, GuestAddress(address)).unwrap(),
                Part::In(len) => self.mem.write_slice(&vec![0xee; *len as usize], GuestAddress(address)).unwrap(),
            }
            let index = (first + i as u16) % QUEUE_SIZE;
            if i + 1 < parts.len() {
                flags |= NEXT;
            }
            self.write_descriptor(
                ring(queue),
                index,
                Descriptor { address, len, flags, next: (index + 1) % QUEUE_SIZE },
            );
            places.push(address);
        }
        self.next_descriptor[usize::from(queue)] = (first + parts.len() as u16) % QUEUE_SIZE;
        (first, places)
    }

    /// Sends a request, waits for its answer, and returns it with what the device wrote into each part.
    pub fn request(&mut self, queue: u16, parts: &[Part]) -> (Used, Vec<Vec<u8>>) {
        let (head, places) = self.prepare(queue, parts);
        self.offer(queue, head);
        let used = self.wait_used(queue).expect("an answer");
        assert_eq!(used.head, head);
        let answers = parts.iter().zip(places).filter_map(|(part, place)| match part {
            Part::In(len) => Some(self.bytes(place, *len)),
            Part::Out(_) => None,
        });
        (used, answers.collect())
    }

    /// Sends a request while the device stands and the dirty log is on, lets the device serve it, and gives how many grains
    /// of memory the device changed, and which of them the log lacks.
    pub fn unnoted(&mut self, queue: u16, parts: &[Part]) -> (usize, Vec<usize>) {
        self.function.pause();
        let (head, _) = self.prepare(queue, parts);
        self.offer(queue, head);
        self.mem.iter().for_each(|region| region.bitmap().log().start());
        let before = self.contents();
        let rings = GuestAddress(ring(queue) + USED + 2);
        let index = || self.mem.load::<u16>(rings, std::sync::atomic::Ordering::Acquire).unwrap();
        let (old, start) = (index(), Instant::now());
        self.function.resume();
        while index() == old && start.elapsed() < PATIENCE {
            rest(start);
        }
        self.function.pause();
        let (mut changed, mut lacking) = (0, Vec::new());
        for ((region, old), new) in self.mem.iter().zip(before).zip(self.contents()) {
            let mut noted = Vec::new();
            region.bitmap().log().take(|grain| noted.push(grain));
            let grains = old.chunks(GRAIN).zip(new.chunks(GRAIN)).enumerate();
            for (grain, _) in grains.filter(|(_, (old, new))| old != new) {
                changed += 1;
                if !noted.contains(&grain) {
                    lacking.push(grain);
                }
            }
        }
        self.function.resume();
        self.wait_used(queue).expect("an answer");
        (changed, lacking)
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        let ranges = self.mem.iter().map(|region| (region.start_addr().0, u32::try_from(region.len()).unwrap()));
        ranges.map(|(start, len)| self.bytes(start, len)).collect()
    }

    /// Copies out of guest memory.
    pub fn bytes(&self, address: u64, len: u32) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.mem.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// The next entry of the used ring, if there is one.
    pub fn poll_used(&mut self, queue: u16) -> Option<Used> {
        let rings = ring(queue) + USED;
        let index: u16 = self.mem.load(GuestAddress(rings + 2), std::sync::atomic::Ordering::Acquire).unwrap();
        let seen = &mut self.used[usize::from(queue)];
        if index == *seen {
            return None;
        }
        let slot = GuestAddress(rings + 4 + u64::from(*seen % QUEUE_SIZE) * 8);
        *seen = seen.wrapping_add(1);
        let entry: u64 = self.mem.read_obj(slot).unwrap();
        // Asks for an interrupt at the next one, if EVENT_IDX is on.
        let event = GuestAddress(ring(queue) + AVAIL + 4 + u64::from(QUEUE_SIZE) * 2);
        self.mem.write_obj(*seen, event).unwrap();
        Some(Used { head: entry as u16, len: (entry >> 32) as u32 })
    }

    /// Waits for the next used entry; `None` if the device has asked for a reset or does not answer in time.
    pub fn wait_used(&mut self, queue: u16) -> Option<Used> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(used) = self.poll_used(queue) {
                return Some(used);
            }
            if self.broken() {
                return self.poll_used(queue);
            }
            rest(start);
        }
        None
    }

    /// Whether the device has asked to be reset.
    pub fn broken(&self) -> bool {
        self.status() & 0x40 != 0
    }

    /// Waits until `condition` holds.
    pub fn wait_for(&self, condition: impl Fn(&Self) -> bool) -> bool {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if condition(self) {
                return true;
            }
            rest(start);
        }
        false
    }
}

fn ring(queue: u16) -> u64 {
    RINGS + u64::from(queue) * RING_STRIDE
}

/// Lets the device run: most answers come at once, and a test that waits longer should not keep a processor busy.
fn rest(since: Instant) {
    if since.elapsed() < Duration::from_micros(200) {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(100));
    }
}
