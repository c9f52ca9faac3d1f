//! The part of the contract that is about virtio: what a hostile driver can do to a device, and what it cannot.
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

use ovms_state::Persist;
use vm_memory::{Bytes, GuestAddress};

use super::contract::{self, Random};
use super::driver::{function, guest_memory, Descriptor, Driver, INDIRECT, INDIRECT_TABLE, NEXT, QUEUE_SIZE, WRITE};
use super::FunctionBus;
use crate::virtio::pci::VirtioPci;
use crate::virtio::VirtioDevice;

/// The longest that a device may keep a pause waiting, whatever its driver does.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// The whole contract: registers, hostile chains, saving, on devices that `make` builds.
pub fn device<D: VirtioDevice + 'static>(make: impl Fn() -> Arc<D>) {
    registers(&make);
    hostile_chains(&make);
    random_chains(&make);
    reset_while_running(&make);
    saved_while_running(&make);
}

fn registers<D: VirtioDevice + 'static>(make: &impl Fn() -> Arc<D>) {
    let bus = || Arc::new(FunctionBus(function(make(), guest_memory()).0));
    contract::bus_device(bus, FunctionBus::<VirtioPci>::LEN);
    contract::reset(bus, |bus| crate::pci::PciFunction::reset(bus.0.as_ref()), FunctionBus::<VirtioPci>::LEN);
    contract::persist(bus, FunctionBus::<VirtioPci>::LEN);
}

/// A descriptor chain, written at the start of the table, and its name.
pub type Chain = (&'static str, Vec<Descriptor>);

fn d(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len, flags, next }
}

/// Chains that break the rules for every device.
pub fn broken_chains() -> Vec<Chain> {
    let buffer = 0x20_0000;
    vec![
        ("loops on itself", vec![d(buffer, 16, NEXT, 0)]),
        ("loops over two", vec![d(buffer, 16, NEXT, 1), d(buffer, 16, NEXT, 0)]),
        ("leaves the table", vec![d(buffer, 16, NEXT, QUEUE_SIZE)]),
        ("leaves the table far", vec![d(buffer, 16, NEXT | WRITE, u16::MAX)]),
        ("outside of memory", vec![d(0x40_0000, 16, WRITE, 0)]),
        ("at the end of the address space", vec![d(u64::MAX - 8, 16, 0, 0)]),
        ("over the end of a region", vec![d(0x40_0000 - 8, 16, WRITE, 0)]),
        ("huge", vec![d(0, u32::MAX, WRITE, 0)]),
        ("two huge", vec![d(0, u32::MAX, NEXT, 1), d(0, u32::MAX, 0, 0)]),
        ("readable after writable", vec![d(buffer, 16, WRITE | NEXT, 1), d(buffer, 16, 0, 0)]),
        ("indirect in indirect", vec![d(INDIRECT + 0x1000, 32, INDIRECT_TABLE, 0)]),
        ("indirect of odd length", vec![d(INDIRECT, 17, INDIRECT_TABLE, 0)]),
        ("indirect outside of memory", vec![d(0x7f_ffff_0000, 32, INDIRECT_TABLE, 0)]),
        ("indirect that loops", vec![d(INDIRECT, 32, INDIRECT_TABLE, 0)]),
        ("indirect without entries", vec![d(INDIRECT, 0, INDIRECT_TABLE, 0)]),
        ("indirect of the largest size", vec![d(INDIRECT, 0xffff * 16, INDIRECT_TABLE, 0)]),
        ("indirect of 4 GiB", vec![d(INDIRECT, 0xffff_fff0, INDIRECT_TABLE, 0)]),
    ]
}

/// Chains that are well formed and mean nothing to any device; it may answer or break, but not crash.
fn odd_chains() -> Vec<Chain> {
    let buffer = 0x20_0000;
    vec![
        ("zero length", vec![d(buffer, 0, 0, 0)]),
        ("zero length, writable", vec![d(buffer, 0, WRITE, 0)]),
        ("one byte", vec![d(buffer, 1, 0, 0)]),
        ("one byte, writable", vec![d(buffer, 1, WRITE, 0)]),
        ("all of memory", vec![d(0, 4 << 20, 0, 0)]),
        ("much, writable", vec![d(buffer, 1 << 20, WRITE, 0)]),
        (
            "readable and writable",
            vec![d(buffer, 16, NEXT, 1), d(buffer, 512, WRITE | NEXT, 2), d(buffer, 1, WRITE, 0)],
        ),
    ]
}

/// Tables for the chains that are indirect: one that loops, one that holds an indirect descriptor.
pub fn write_tables(driver: &Driver) {
    driver.write_descriptor(INDIRECT, 0, d(0x20_0000, 16, NEXT, 1));
    driver.write_descriptor(INDIRECT, 1, d(0x20_0000, 16, NEXT, 0));
    driver.write_descriptor(INDIRECT + 0x1000, 0, d(INDIRECT, 16, INDIRECT_TABLE | NEXT, 1));
    driver.write_descriptor(INDIRECT + 0x1000, 1, d(0x20_0000, 16, 0, 0));
}

fn hostile_chains<D: VirtioDevice + 'static>(make: &impl Fn() -> Arc<D>) {
    let queues = make().queue_max_sizes().len() as u16;
    for queue in 0..queues {
        let mut driver = Driver::ready(make(), 0);
        for (name, chain) in broken_chains().into_iter().chain(odd_chains()) {
            write_tables(&driver);
            for (index, descriptor) in chain.iter().enumerate() {
                driver.write_descriptor(driver.table(queue), index as u16, *descriptor);
            }
            driver.offer(queue, 0);
            settle(&driver, name);
            driver.start(0);
        }
        for index in [QUEUE_SIZE + 1, 0x8000, u16::MAX] {
            driver.set_avail_index(queue, index);
            driver.kick(queue);
            settle(&driver, "an available index out of range");
            driver.start(0);
        }
        for head in [QUEUE_SIZE, u16::MAX] {
            driver.offer(queue, head);
            settle(&driver, "a head outside of the table");
            driver.start(0);
        }
    }
}

/// Waits until the device has seen what was offered: a pause returns only between requests.
fn settle(driver: &Driver, what: &str) {
    let start = Instant::now();
    driver.function.pause();
    driver.function.resume();
    driver.function.pause();
    driver.function.resume();
    assert!(start.elapsed() < PAUSE_LIMIT, "{what}: the pause took {:?}", start.elapsed());
}

/// Random tables, random heads, and registers stirred while the device runs.
fn random_chains<D: VirtioDevice + 'static>(make: &impl Fn() -> Arc<D>) {
    let device = make();
    let queues = device.queue_max_sizes().len();
    let mut driver = Driver::ready(device, 0);
    let mut random = Random::new(7);
    for round in 0..300 {
        let queue = random.below(queues) as u16;
        for index in 0..QUEUE_SIZE {
            let (table, address) = match random.below(8) {
                0 => (INDIRECT, random.odd_value()),
                _ => (driver.table(queue), 0x20_0000 + random.next_u64() % 0x10_0000),
            };
            let len = (random.odd_value() >> random.below(33)) as u32 % 0x2_0000;
            let flags = (random.next_u64() & 7) as u16 & if random.below(4) == 0 { 7 } else { 3 };
            let next = random.below(usize::from(QUEUE_SIZE) + 1) as u16;
            let address = if flags & INDIRECT_TABLE != 0 { INDIRECT } else { address };
            driver.write_descriptor(table, index, d(address, len, flags, next));
        }
        for _ in 0..4 {
            driver.offer(queue, random.below(usize::from(QUEUE_SIZE)) as u16);
        }
        // A write to the registers of a live queue must not reach it.
        driver.write(0x16, 2, queue.into());
        driver.write([0x18, 0x20, 0x28, 0x30, 0x1c][random.below(5)], [2, 4, 8][random.below(3)], random.next_u64());
        if round % 10 == 0 {
            settle(&driver, "random chains");
        }
        if driver.broken() {
            driver.start(0);
        }
    }
}

fn reset_while_running<D: VirtioDevice + 'static>(make: &impl Fn() -> Arc<D>) {
    let device = make();
    let queues = device.queue_max_sizes().len() as u16;
    let mut driver = Driver::ready(device, 0);
    for round in 0..20u16 {
        for queue in 0..queues {
            driver.write_descriptor(
                driver.table(queue),
                0,
                d(0x20_0000, 4096, if round % 2 == 0 { WRITE } else { 0 }, 0),
            );
            for _ in 0..QUEUE_SIZE {
                driver.offer(queue, 0);
            }
        }
        driver.start(0);
        // After the reset nothing may be written into what were the rings: `start` cleared them.
        let clean: Vec<u16> = (0..queues).map(|q| driver.poll_used(q).map_or(0, |_| q + 1)).collect();
        assert!(clean.iter().all(|q| *q == 0), "a request of before the reset was answered after it");
    }
}

/// A device that was saved while its driver used it goes on in a new machine over the same memory.
fn saved_while_running<D: VirtioDevice + 'static>(make: &impl Fn() -> Arc<D>) {
    let mut driver = Driver::ready(make(), 0);
    let queues = driver.function.device().queue_max_sizes().len() as u16;
    for queue in 0..queues {
        driver.write_descriptor(driver.table(queue), 0, d(0x20_0000, 4096, WRITE, 0));
        driver.offer(queue, 0);
    }
    settle(&driver, "before saving");
    let saved = driver.function.save().unwrap();
    let (restored, _) = function(make(), driver.mem.clone());
    restored.restore(&saved).unwrap();
    assert_eq!(restored.save().unwrap(), saved, "restored and saved again");
    restored.resume();
    restored.pause();
    let damaged_base = driver.function.save().unwrap();
    let mem = driver.mem.clone();
    let fresh = || function(make(), mem.clone()).0;
    contract::damaged_sections(&damaged_base, fresh, |function: &VirtioPci, seed| {
        function.resume();
        let mut random = Random::new(seed);
        for _ in 0..200 {
            let offset = random.next_u64() % 0x6000;
            crate::pci::PciFunction::bar_write(function, 0, offset, &random.next_u64().to_le_bytes()[..4]);
        }
        function.pause();
    });
    // The rings were not harmed: they still lie where they lay.
    let _: u64 = driver.mem.read_obj(GuestAddress(driver.table(0))).unwrap();
}
