use super::*;
use crate::pci::PvPanic;
use crate::testkit::{contract, EventLog};

const WINDOW: BarRange = BarRange { address: 0xe000_0000, size: 0x1000_0000 };

/// Slot, old place, new place.
type Move = (u8, Option<u64>, Option<u64>);

#[derive(Default)]
struct Moves(Mutex<Vec<Move>>);

impl Moves {
    fn take(&self) -> Vec<Move> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl BarListener for Moves {
    fn bar_moved(&self, slot: Slot, _bar: usize, old: Option<BarRange>, new: Option<BarRange>) {
        lock(&self.0).push((slot.0, old.map(|r| r.address), new.map(|r| r.address)));
    }
}

struct Setup {
    root: Arc<PciRoot>,
    moves: Arc<Moves>,
    log: Arc<EventLog>,
    functions: [Arc<PvPanic>; 2],
}

/// Two pvpanic functions, in slots 1 and 2, one page apart.
fn setup() -> Setup {
    let (moves, log) = (Arc::<Moves>::default(), Arc::<EventLog>::default());
    let mut builder = PciRootBuilder::new(&[WINDOW]);
    builder.listener(moves.clone());
    let functions = [1u8, 2].map(|slot| {
        let address = WINDOW.address + u64::from(slot) * 0x1000;
        let function = PvPanic::new(address, log.clone()).unwrap();
        builder.add(Slot(slot), function.clone()).unwrap();
        function
    });
    Setup { root: builder.build(), moves, log, functions }
}

fn ecam_read(root: &Arc<PciRoot>, slot: u64, register: u64) -> u32 {
    let mut data = [0; 4];
    root.ecam().read((slot << 15) | register, &mut data);
    u32::from_le_bytes(data)
}

fn ecam_write(root: &Arc<PciRoot>, slot: u64, register: u64, value: u32) {
    root.ecam().write((slot << 15) | register, &value.to_le_bytes());
}

fn poke(root: &Arc<PciRoot>, address: u64) {
    root.windows()[0].1.write(address - WINDOW.address, &[1]);
}

#[test]
fn ports_and_ecam_show_the_same_functions() {
    let s = setup();
    for slot in 0..4u32 {
        s.root.config_address().write(0, &(ADDRESS_ENABLE | (slot << 11)).to_le_bytes());
        let mut data = [0; 4];
        s.root.config_data().read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), ecam_read(&s.root, slot.into(), 0));
    }
    assert_eq!(ecam_read(&s.root, 0, 0), 0x0008_1b36);
    assert_eq!(ecam_read(&s.root, 1, 0), 0x0011_1b36);
    assert_eq!(ecam_read(&s.root, 3, 0), 0xffff_ffff);
}

#[test]
fn words_and_bytes_of_the_data_port_are_found() {
    let s = setup();
    s.root.config_address().write(0, &(ADDRESS_ENABLE | (1 << 11)).to_le_bytes());
    let mut word = [0; 2];
    s.root.config_data().read(2, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x0011);
    s.root.config_address().write(0, &0u32.to_le_bytes());
    s.root.config_data().read(2, &mut word);
    assert_eq!(word, [0xff; 2], "not enabled");
}

#[test]
fn bars_placed_at_power_on_are_told_and_decoded() {
    let s = setup();
    assert_eq!(s.moves.take(), [(1, None, Some(0xe000_1000)), (2, None, Some(0xe000_2000))]);
    poke(&s.root, 0xe000_1000);
    assert_eq!(s.log.take().len(), 1);
    poke(&s.root, 0xe000_3000);
    assert!(s.log.take().is_empty());
}

#[test]
fn bar_moved_by_the_guest_is_decoded_at_its_new_place() {
    let s = setup();
    s.moves.take();
    ecam_write(&s.root, 1, 0x10, 0xe800_0000);
    assert_eq!(s.moves.take(), [(1, Some(0xe000_1000), None), (1, None, Some(0xe800_0000))]);
    poke(&s.root, 0xe000_1000);
    assert!(s.log.take().is_empty());
    poke(&s.root, 0xe800_0000);
    assert_eq!(s.log.take().len(), 1);
}

#[test]
fn bar_outside_of_the_windows_is_not_decoded() {
    let s = setup();
    s.moves.take();
    for address in [0x1000, 0xdfff_f000, 0xf000_0000, 0xfec0_0000] {
        ecam_write(&s.root, 1, 0x10, address);
    }
    assert_eq!(s.moves.take(), [(1, Some(0xe000_1000), None)]);
}

#[test]
fn bar_over_another_is_not_decoded_until_that_one_leaves() {
    let s = setup();
    s.moves.take();
    ecam_write(&s.root, 2, 0x10, 0xe000_1000);
    assert_eq!(s.moves.take(), [(2, Some(0xe000_2000), None)]);
    ecam_write(&s.root, 1, 0x04, 0);
    assert_eq!(s.moves.take(), [(1, Some(0xe000_1000), None), (2, None, Some(0xe000_1000))]);
}

#[test]
fn reset_brings_the_bars_back() {
    let s = setup();
    ecam_write(&s.root, 1, 0x10, 0xe800_0000);
    s.root.reset();
    poke(&s.root, 0xe000_1000);
    assert_eq!(s.log.take().len(), 1);
}

#[test]
fn add_to_a_taken_slot_returns_bad_slot() {
    let mut builder = PciRootBuilder::new(&[WINDOW]);
    let function = PvPanic::new(WINDOW.address, Arc::<EventLog>::default()).unwrap();
    assert_eq!(builder.add(Slot(0), function.clone()), Err(PciError::BadSlot(0)));
    assert_eq!(builder.add(Slot(32), function.clone()), Err(PciError::BadSlot(32)));
    builder.add(Slot(31), function).unwrap();
}

/// A bus with its functions, as the guest reaches it by ports, ECAM and window.
struct Devices(Setup, [Arc<dyn BusDevice>; 4]);

impl BusDevice for Devices {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.1[(offset >> 13) as usize % 4].read(scatter(offset), data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.1[(offset >> 13) as usize % 4].write(scatter(offset), data);
    }
}

/// Spreads offsets over the slots as well as the registers.
fn scatter(offset: u64) -> u64 {
    (offset & 0xff) | ((offset >> 8) & 3) << 15
}

fn devices() -> Arc<Devices> {
    let setup = setup();
    let root = &setup.root;
    let window = root.windows().remove(0).1;
    let all = [root.config_address(), root.config_data(), root.ecam(), window];
    Arc::new(Devices(setup, all))
}

impl Devices {
    /// Where each BAR is decoded.
    fn places(&self) -> Vec<u64> {
        self.0.root.mappings.read().unwrap().iter().map(|mapping| mapping.range.address).collect()
    }
}

/// All sections as one, restored in the machine's order: functions, then the root, which decodes their BARs.
impl Persist for Devices {
    fn save(&self) -> Result<Section, StateError> {
        let [first, second] = &self.0.functions;
        Section::encode("pci", 1, &[first.save()?, second.save()?, self.0.root.save()?])
    }
    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let [first, second, root]: [Section; 3] = section.decode("pci", 1)?;
        let [first_function, second_function] = &self.0.functions;
        first_function.restore(&first)?;
        second_function.restore(&second)?;
        self.0.root.restore(&root)
    }
}

#[test]
fn contract_holds() {
    contract::bus_device(devices, 4 << 13);
    contract::reset(devices, |devices| devices.0.root.reset(), 4 << 13);
    contract::damaged_sections(&setup().root.save().unwrap(), || setup().root, |_, _| {});
}

/// As [`contract::persist`]: a stirred bus saves, restores and saves the same, and decodes the same BARs.
#[test]
fn stirred_bus_saves_restores_and_saves_the_same() {
    let mut moved = 0;
    for seed in 0..64 {
        let bus = devices();
        contract::stir(bus.as_ref(), 4 << 13, seed);
        if seed % 2 == 0 {
            ecam_write(&bus.0.root, 1, 0x10, 0xe000_3000 + ((seed as u32) << 16));
            ecam_write(&bus.0.root, 1, 0x04, 2);
            moved += u64::from(bus.places().contains(&(0xe000_3000 + (seed << 16))));
        }
        let saved = bus.save().unwrap();
        let other = devices();
        other.restore(&saved).unwrap();
        assert_eq!(other.save().unwrap(), saved, "restored and saved again, seed {seed}");
        assert_eq!(other.places(), bus.places(), "seed {seed}");
        assert_eq!(contract::fingerprint(other.as_ref(), 4 << 13), contract::fingerprint(bus.as_ref(), 4 << 13));
    }
    assert!(moved > 16, "a BAR has moved {moved} times");
}
