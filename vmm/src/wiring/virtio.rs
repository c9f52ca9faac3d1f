//! The virtio devices of a machine: its disks, a console, entropy, a balloon.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ovms_config::vm::{DiskConfig, TopConfig, VmConfig};
use ovms_devices::console::{ByteSink, InputQueue};
use ovms_devices::threads::{Spawner, ThreadKind};
use ovms_devices::virtio::balloon::Balloon;
use ovms_devices::virtio::blk::{Block, BlockOptions};
use ovms_devices::virtio::console::Console;
use ovms_devices::virtio::pci::VirtioPci;
use ovms_devices::virtio::rng::Rng;
use ovms_devices::virtio::{MemoryDiscard, WorkerThread};
use ovms_disk::{Stack, StackFiles, TopFiles};
use serde::{Deserialize, Serialize};

use super::pci::PciBuilder;
use super::WiringError;
use crate::fds::Fds;

/// Queues of a disk at most: each is a thread, and two saturate what a guest of any size asks for here.
const MAX_DISK_QUEUES: u32 = 4;

/// The devices that share a thread, as an error names them.
const QUIET: &str = "virtio console, entropy source and balloon";

/// Which of the two consoles the host's input goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputOwner {
    /// COM1.
    Serial,
    /// The virtio console.
    Virtio,
}

impl InputOwner {
    /// The console that the kernel makes /dev/console: the last `console=` of its command line.
    pub fn of(cmdline: &str) -> Self {
        let last = cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix("console=")).next_back();
        match last {
            Some(name) if name.starts_with("hvc") => Self::Virtio,
            _ => Self::Serial,
        }
    }
}

/// The virtio devices that are needed by name afterwards.
pub(super) struct Virtio {
    pub disks: Vec<Arc<Stack>>,
    pub console: Arc<Console>,
    pub balloon: Arc<Balloon>,
    pub functions: Vec<Arc<VirtioPci>>,
}

impl Virtio {
    pub(super) fn new(
        pci: &mut PciBuilder<'_>,
        config: &VmConfig,
        fds: &mut Fds,
        console: (Arc<InputQueue>, Arc<dyn ByteSink>),
        memory: Arc<dyn MemoryDiscard>,
        spawner: &Spawner,
    ) -> Result<Self, WiringError> {
        let mut functions = Vec::new();
        let mut disks = Vec::new();
        for (index, disk) in config.disks.iter().enumerate() {
            let stack = Arc::new(open(index, disk, fds)?);
            let queues = config.vcpus.min(MAX_DISK_QUEUES) as u16;
            let options = BlockOptions { queues, serial: disk.serial.clone() };
            let device = Block::new(Arc::clone(&stack) as _, &options, spawner).map_err(no_start("disk"))?;
            functions.push(pci.add_virtio(format!("virtio-blk/{index}"), device)?);
            disks.push(stack);
        }
        // None of the others waits for anything, so one thread serves them: each costs a start 0.1 ms (ADR 0015).
        let mut thread = WorkerThread::new().map_err(no_start(QUIET))?;
        let (input, sink) = console;
        let console = Console::new(input, sink, &mut thread).map_err(no_start("virtio console"))?;
        functions.push(pci.add_virtio("virtio-console".into(), Arc::clone(&console) as _)?);
        functions.push(pci.add_virtio("virtio-rng".into(), Rng::new(&mut thread))?);
        let balloon = Balloon::new(memory, &mut thread).map_err(no_start("balloon"))?;
        functions.push(pci.add_virtio("virtio-balloon".into(), Arc::clone(&balloon) as _)?);
        thread.spawn(spawner, ThreadKind::Device, "virtio").map_err(no_start(QUIET))?;
        Ok(Self { disks, console, balloon, functions })
    }
}

fn no_start(what: &'static str) -> impl FnOnce(io::Error) -> WiringError {
    move |err| WiringError::Start(what, err)
}

fn open(index: usize, disk: &DiskConfig, fds: &mut Fds) -> Result<Stack, WiringError> {
    let files = StackFiles {
        table: fds.take_file(disk.table)?,
        layers: disk.layers.iter().map(|layer| fds.take_file(*layer)).collect::<Result<_, _>>()?,
        frozen: disk.frozen.iter().map(|top| take_top(top, fds)).collect::<Result<_, _>>()?,
        top: Some(take_top(&disk.top, fds)?),
    };
    Stack::open(files, disk.read_only).map_err(|err| WiringError::Disk(index, err))
}

fn take_top(top: &TopConfig, fds: &mut Fds) -> Result<TopFiles, WiringError> {
    Ok(TopFiles { data: fds.take_file(top.data)?, map: fds.take_file(top.map)? })
}

/// The two files of a new top, as they come with a command.
pub(super) fn new_top(fds: Vec<OwnedFd>) -> Option<TopFiles> {
    let [data, map] = <[OwnedFd; 2]>::try_from(fds).ok()?;
    Some(TopFiles { data: data.into(), map: map.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_goes_to_the_last_console_of_the_command_line() {
        assert_eq!(InputOwner::of(""), InputOwner::Serial);
        assert_eq!(InputOwner::of("console=hvc0 console=ttyS0,115200 quiet"), InputOwner::Serial);
        assert_eq!(InputOwner::of("console=ttyS0 console=hvc0 quiet"), InputOwner::Virtio);
    }
}
