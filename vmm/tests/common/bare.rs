//! A saved machine restored without KVM: the reader of state files, the decoders of all sections and the real devices on
//! their real buses, without processors that could run. Also the entry of the fuzz target `sections` (test/fuzz).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ovms_config::vm::{
    ConsoleConfig, DiskConfig, JailConfig, RestoreConfig, StartConfig, TopConfig, VmConfig, VmSpec, VM_CONFIG_VERSION,
};
use ovms_devices::irq::MsiMessage;
use ovms_devices::threads::Spawner;
use ovms_disk::{Table, Top};
use ovms_state::{unpack, Blob, Head, Limits, Section, StateFile, MAX_SECTION_BYTES};
use ovms_vmm::clock::{self, Clock};
use ovms_vmm::fds::Fds;
use ovms_vmm::memory::Ram;
use ovms_vmm::saved::Saved;
use ovms_vmm::vcpu::state::VcpuV1;
use ovms_vmm::wiring::parts::Sections;
use ovms_vmm::wiring::{Devices, Environment, Hypervisor};
use twox_hash::{XxHash3_128, XxHash3_64};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

/// The name by which golden diffs know their parent; what its own digest is plays no part.
pub const BASE: &str = "sha256:1111111111111111111111111111111111111111111111111111111111111111";
/// A name for a diff on it.
const DIFF: &str = "sha256:2222222222222222222222222222222222222222222222222222222222222222";
/// How long devices may take to stand.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes interrupts and doorbells, and does nothing with them.
struct Nowhere;

impl Hypervisor for Nowhere {
    fn signal(&self, _: MsiMessage) -> errno::Result<()> {
        Ok(())
    }

    fn set_routes(&self, _: &[(u32, MsiMessage)]) -> errno::Result<()> {
        Ok(())
    }

    fn add_doorbell(&self, _: u64, _: &EventFd) -> errno::Result<()> {
        Ok(())
    }

    fn remove_doorbell(&self, _: u64, _: &EventFd) -> errno::Result<()> {
        Ok(())
    }
}

/// An unpacked snapshot.
pub struct Unpacked {
    pub head: Head,
    pub sections: Vec<Section>,
    pub state: File,
    pub memory: File,
}

impl Unpacked {
    /// Of a base, or of a diff and the base that it is on.
    pub fn of(chain: &[&[u8]]) -> Self {
        let (memory, state) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let blobs = chain.iter().map(|blob| Blob::open(file(blob)).unwrap()).collect();
        let names = [DIFF, BASE].map(str::to_owned);
        let names = &names[names.len() - chain.len()..];
        unpack(blobs, names, (&memory, &state), 2, Limits { memory: 1 << 30 }, &mut |_, _| true).unwrap();
        let (head, sections) = StateFile::read(&state).unwrap();
        Self { head, sections, state, memory }
    }

    /// Its memory, mapped. It stays so as long as the process lives.
    pub fn map(&self) -> Ram {
        Ram::restore(&self.memory, self.head.memory, false).unwrap()
    }
}

/// A file with these bytes.
pub fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A configuration of the size of a saved machine, without disks. It names six descriptors at which nothing here looks.
pub fn config(head: &Head) -> VmConfig {
    let start = RestoreConfig { state: 4, memory: 5, working_set: None, record_working_set: None, mlock: false };
    let jail = JailConfig {
        uid: 1,
        gid: 1,
        root: 2,
        netns: 3,
        hostname: "test".into(),
        max_file_size: 1 << 40,
        max_open_files: 512,
    };
    VmConfig {
        version: VM_CONFIG_VERSION,
        id: "test".into(),
        vcpus: head.vcpus,
        memory: head.memory,
        kvm: 0,
        cpuid: 1,
        userfault: None,
        start: StartConfig::Restore(start),
        disks: Vec::new(),
        console: ConsoleConfig::default(),
        jail,
        log_level: "info".into(),
    }
}

/// The same with disks of the saved sizes, and the descriptors.
fn with_disks(head: &Head) -> (VmConfig, Vec<OwnedFd>) {
    let (mut config, null) = (config(head), File::open("/dev/null").unwrap());
    let mut fds: Vec<_> = (0..6).map(|_| OwnedFd::from(null.try_clone().unwrap())).collect();
    for disk in &head.fingerprint.disks {
        let [table, data, map] = [(); 3].map(|()| file(&[]));
        Table::empty(disk.size).unwrap().write_to(&table).unwrap();
        Top::create(&data, &map, disk.size).unwrap();
        let first = fds.len() as u32;
        fds.extend([table, data, map].map(OwnedFd::from));
        let top = TopConfig { data: first + 1, map: first + 2 };
        let (read_only, serial) = (disk.read_only, "disk".into());
        config.disks.push(DiskConfig { table: first, layers: vec![], frozen: vec![], top, read_only, serial });
    }
    (config, fds)
}

/// What the VMM makes of a state file before it builds the machine.
pub fn read(state: &File, head: &Head) -> Result<Saved, String> {
    Saved::read(state, &config(head)).map_err(|err| chain(&err))
}

/// The devices of a machine.
pub struct Bare {
    pub devices: Devices,
    vcpus: u8,
}

impl Bare {
    /// Those of the machine that `head` tells of.
    pub fn new(head: &Head, ram: &Ram, saved: Option<&Saved>) -> Self {
        let (config, fds) = with_disks(head);
        let spec = VmSpec::new(config, fds.len()).unwrap();
        let hypervisor: Arc<dyn Hypervisor> = Arc::new(Nowhere);
        let environment = Environment {
            hypervisor: &hypervisor,
            ram,
            spec: &spec,
            spawner: &Spawner::default(),
            saved,
            events: Arc::new(|_| ()),
        };
        Self { devices: Devices::new(&environment, &mut Fds::new(fds)).unwrap(), vcpus: head.vcpus as u8 }
    }

    /// Everything that a restore does with sections and that no processor is needed for.
    pub fn restore(&self, sections: &[Section]) -> Result<(), String> {
        let mut parts = Sections::new(sections).map_err(|err| chain(&err))?;
        let mut take = |kind: &str| parts.take(kind).map_err(|err| chain(&err));
        take("machine")?;
        Clock::load(take(clock::KIND)?).map_err(|err| chain(&err))?;
        for index in 0..self.vcpus {
            VcpuV1::load(take(&format!("vcpu/{index}"))?, index).map_err(|err| chain(&err))?;
        }
        self.devices.restore(&mut parts).map_err(|err| chain(&err))?;
        parts.finish().map_err(|err| chain(&err))
    }
}

fn chain(err: &(dyn std::error::Error + 'static)) -> String {
    ovms_vmm::report::chain(err)
}

/// The sections with a state file around them, as hostile as its maker likes, through reader and devices: refused, or a
/// machine that saves what it was given, goes on with it and stands again. `sections` must be within the format's bounds.
/// Says whether it was restored.
pub fn is_restored(head: &Head, sections: &[Section], ram: &Ram) -> bool {
    let state = tempfile::tempfile_in("/dev/shm").unwrap();
    StateFile::write(&state, head, sections).unwrap();
    let Ok(saved) = read(&state, head) else { return false };
    let machine = Bare::new(head, ram, Some(&saved));
    if machine.restore(sections).is_err() {
        return false;
    }
    let once = machine.devices.save().unwrap();
    let again = Bare::new(head, ram, Some(&saved));
    let others = sections.iter().filter(|section| once.iter().all(|other| other.kind != section.kind));
    let all: Vec<_> = others.chain(&once).cloned().collect();
    again.restore(&all).unwrap_or_else(|err| panic!("what was saved is refused: {err}"));
    assert_same(&once, &again.devices.save().unwrap());
    machine.devices.resume();
    assert!(machine.devices.hold(Instant::now() + PATIENCE), "the devices stand again");
    machine.devices.save().unwrap();
    true
}

/// The golden machine of version 0.1, and its memory, mapped once for the whole process.
pub fn golden() -> (&'static Unpacked, &'static Ram) {
    static MACHINE: OnceLock<(Unpacked, Ram)> = OnceLock::new();
    let (machine, ram) = MACHINE.get_or_init(|| {
        let machine = Unpacked::of(&[include_bytes!("../golden/0.1/base")]);
        let ram = machine.map();
        (machine, ram)
    });
    (machine, ram)
}

/// What a fuzzer makes: the first byte says which section of the golden machine the rest takes the place of. Says whether
/// it was restored.
pub fn section(input: &[u8]) -> bool {
    let ((machine, ram), Some((choice, payload))) = (golden(), input.split_first()) else { return false };
    let mut sections = machine.sections.clone();
    let place = usize::from(*choice) % sections.len();
    if payload.len() > MAX_SECTION_BYTES {
        return false;
    }
    sections[place].payload = payload.to_vec();
    is_restored(&machine.head, &sections, ram)
}

/// The same sections, but for the ACPI timer, which goes on. What an earlier version saved is saved in this one's words.
pub fn assert_same(one: &[Section], other: &[Section]) {
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter().zip(other) {
        assert_eq!(one.kind, other.kind);
        assert!(one.version <= other.version, "{}", one.kind);
        let text = |section: &Section| {
            let text = String::from_utf8(section.payload.clone()).unwrap();
            match text.split_once("\"timer_nanos\":") {
                Some((before, after)) => format!("{before}{}", after.trim_start_matches(|c: char| c.is_ascii_digit())),
                None => text,
            }
        };
        assert!(one.version < other.version || text(one) == text(other), "{}\n{}", text(one), text(other));
    }
}

/// Puts right checksums around a blob or state file whose head begins at `head`.
pub fn seal(bytes: &mut [u8], head: usize) {
    let length = bytes.len() as u64;
    let sum = XxHash3_128::oneshot(&bytes[head..]).to_le_bytes();
    bytes[16..24].copy_from_slice(&(head as u64).to_le_bytes());
    bytes[24..32].copy_from_slice(&(length - head as u64).to_le_bytes());
    bytes[32..40].copy_from_slice(&length.to_le_bytes());
    bytes[40..56].copy_from_slice(&sum);
    let sum = XxHash3_64::oneshot(&bytes[..56]).to_le_bytes();
    bytes[56..64].copy_from_slice(&sum);
}
