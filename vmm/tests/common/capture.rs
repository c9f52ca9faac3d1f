//! A snapshot made in the test's own process: the machine is built, run and stopped by the library, without jail and walls,
//! and its parts are written as the snapshot's unpacked files.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovms_config::vm::{StartConfig, VmSpec};
use ovms_devices::threads::Spawner;
use ovms_state::{Arch, Fingerprint, Head, Section, StateFile};
use ovms_vmm::boot::Payload;
use ovms_vmm::fds::Fds;
use ovms_vmm::machine::{Base, Machine, ThreadStart};
use ovms_vmm::mailbox::Mailbox;
use ovms_vmm::memory::Ram;
use ovms_vmm::saved::Saved;
use ovms_vmm::timeline::Recorder;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{pipe, Setup};

/// What is copied at once.
const BLOCK: usize = 2 << 20;
/// How long a guest may take to say something: one that boots on an emulated processor takes minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// A machine in this process.
pub struct Inside {
    pub machine: Machine,
    pub ram: Ram,
    vcpus: u32,
    output: File,
    said: String,
    _mailbox: Mailbox,
    _input: File,
}

impl Inside {
    /// Builds `setup`'s machine and loads its kernel.
    pub fn boot(setup: Setup) -> Self {
        Self::make(setup, None)
    }

    /// Builds `setup`'s machine and restores `snapshot` into it.
    pub fn restore(setup: Setup, snapshot: &Snapshot) -> Self {
        Self::make(setup, Some(snapshot))
    }

    fn make(mut setup: Setup, snapshot: Option<&Snapshot>) -> Self {
        let (output, out) = pipe();
        let (inn, input) = pipe();
        setup.config.console.output = Some(setup.fd(out));
        setup.config.console.input = Some(setup.fd(inn));
        let start = setup.config.start.clone();
        let spec = VmSpec::new(setup.config, setup.fds.len()).unwrap();
        let mut fds = Fds::new(setup.fds);
        let saved = snapshot.map(|snapshot| Saved::read(&snapshot.state, spec.config()).unwrap());
        let ram = match snapshot {
            None => Ram::map(spec.config().memory).unwrap(),
            Some(snapshot) => Ram::restore(&snapshot.memory, spec.config().memory, false).unwrap(),
        };
        let (mail, mailbox) = Mailbox::new().unwrap();
        let threads =
            ThreadStart { device: Spawner::default(), vcpu: Arc::new(|| ()), beside: Box::new(|chore| chore()) };
        let mut timeline = Recorder::start();
        let base = Base::new(spec.config(), &mut fds, ram.clone(), &threads).unwrap();
        let machine = Machine::build(base, &spec, &mut fds, mail, &threads, saved.as_ref(), &mut timeline).unwrap();
        match (start, &saved) {
            (StartConfig::Boot(boot), None) => {
                let kernel = fds.take_file(boot.kernel).unwrap();
                let initrd = fds.take_optional(boot.initrd).unwrap().map(File::from);
                machine.boot(Payload { kernel, initrd, cmdline: boot.cmdline }, &mut timeline).unwrap();
            }
            (_, Some(saved)) => machine.restore(saved, &mut timeline).unwrap(),
            other => panic!("{other:?}"),
        }
        let vcpus = spec.config().vcpus;
        Self { machine, ram, vcpus, output, said: String::new(), _mailbox: mailbox, _input: input }
    }

    /// Runs until the console has said `text`, then stops.
    pub fn run_until(&mut self, text: &str) -> &str {
        self.machine.open();
        let begin = Instant::now();
        let mut buffer = [0u8; 4096];
        while !self.said.contains(text) {
            assert!(begin.elapsed() < PATIENCE, "no {text:?} in {:?}", self.said);
            let count = self.output.read(&mut buffer).unwrap();
            self.said.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        assert!(self.machine.close(), "the guest has ended");
        &self.said
    }

    /// Runs for a moment, then stops.
    pub fn run_for(&self, time: Duration) {
        self.machine.open();
        std::thread::sleep(time);
        assert!(self.machine.close(), "the guest has ended");
    }

    /// Saves the machine, which stands.
    pub fn save(&self) -> Snapshot {
        let (fingerprint, sections) = self.machine.save().unwrap();
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(self.ram.size()).unwrap();
        let (mut at, zeroes, mut block) = (0, vec![0u8; BLOCK], vec![0u8; BLOCK]);
        for region in self.ram.memory().iter() {
            for offset in (0..region.len()).step_by(BLOCK) {
                region.read_slice(&mut block, MemoryRegionAddress(offset)).unwrap();
                if block != zeroes {
                    memory.write_all_at(&block, at).unwrap();
                }
                at += BLOCK as u64;
            }
        }
        Snapshot::write(self.vcpus, self.ram.size(), fingerprint, sections, memory)
    }
}

/// The unpacked files of a snapshot.
pub struct Snapshot {
    pub vcpus: u32,
    pub size: u64,
    pub fingerprint: Fingerprint,
    pub sections: Vec<Section>,
    pub state: File,
    pub memory: File,
}

impl Snapshot {
    pub fn write(vcpus: u32, size: u64, fingerprint: Fingerprint, sections: Vec<Section>, memory: File) -> Self {
        let head = Head { arch: Arch::HOST, vcpus, memory: size, parent: None, fingerprint: fingerprint.clone() };
        let state = tempfile::tempfile().unwrap();
        StateFile::write(&state, &head, &sections).unwrap();
        Self { vcpus, size, fingerprint, sections, state, memory }
    }

    /// The same with other words in it.
    pub fn changed(&self, change: impl FnOnce(&mut Fingerprint, &mut Vec<Section>)) -> Self {
        let (mut fingerprint, mut sections) = (self.fingerprint.clone(), self.sections.clone());
        change(&mut fingerprint, &mut sections);
        Self::write(self.vcpus, self.size, fingerprint, sections, self.memory.try_clone().unwrap())
    }

    /// Replaces the value at `pointer` of the section of `kind`.
    pub fn with_value(&self, kind: &str, pointer: &str, value: serde_json::Value) -> Self {
        self.changed(|_, sections| {
            let section = sections.iter_mut().find(|section| section.kind == kind).unwrap();
            let mut state: serde_json::Value = serde_json::from_slice(&section.payload).unwrap();
            *state.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer} of {kind}")) = value;
            section.payload = serde_json::to_vec(&state).unwrap();
        })
    }

    /// A machine that goes on from here, without disks.
    pub fn setup(&self) -> Setup {
        let clone = |file: &File| -> OwnedFd { file.try_clone().unwrap().into() };
        Setup::restore(clone(&self.state), clone(&self.memory)).vcpus(self.vcpus).memory(self.size)
    }
}
