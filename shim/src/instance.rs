//! The seam between the task service and what it manages. The service knows machines only as [`Instance`]s that a
//! [`Maker`] makes: `machine.rs` is the real one, tests drive the service with a stub. All methods block; the service
//! calls them from threads of their own and holds no lock meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use ovms_engine::{CreateSpec, Limits, Stats};

use crate::error::Result;

/// What can be told to a machine that knows no Unix signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Press {
    /// The ACPI power button.
    PowerButton,
    /// The end, without asking the guest.
    Kill,
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit status that the user sees.
    pub status: u32,
    /// When.
    pub at: SystemTime,
    /// The kernel killed the VMM for want of memory in its control group.
    pub oom: bool,
}

/// How a machine is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Save {
    /// Leave the vCPUs standing afterwards, since the machine is about to be ended.
    pub stop: bool,
}

/// One machine. It is made with its VMM process alive and its vCPUs standing still.
pub trait Instance: Send + Sync + 'static {
    /// The VMM's process id on the host.
    fn pid(&self) -> u32;

    /// Lets the vCPUs run for the first time.
    ///
    /// # Errors
    /// When the machine is not fresh or its VMM fails.
    fn start(&self) -> Result<()>;

    /// Presses a button; returns before it has taken effect.
    ///
    /// # Errors
    /// When the VMM does not take it; never for [`Press::Kill`] of a live machine.
    fn press(&self, what: Press) -> Result<()>;

    /// Stops the vCPUs; returns when the last one stands still.
    ///
    /// # Errors
    /// When the VMM fails.
    fn pause(&self) -> Result<()>;

    /// Lets stopped vCPUs go on.
    ///
    /// # Errors
    /// When the VMM fails.
    fn resume(&self) -> Result<()>;

    /// Saves all of the machine into `dir`, an empty directory; the vCPUs then do what they did before unless `how` says
    /// otherwise. It is asked every now and then whether that is still wanted.
    ///
    /// # Errors
    /// When it is not wanted any more, the disk is full or the VMM fails. The machine goes on and the directory is empty.
    fn save(&self, dir: &Path, how: Save, wanted: &(dyn Fn() -> bool + Sync)) -> Result<()>;

    /// Tells the guest the size of its console in characters.
    ///
    /// # Errors
    /// When the VMM fails.
    fn resize(&self, columns: u16, rows: u16) -> Result<()>;

    /// Changes the limits that are given.
    ///
    /// # Errors
    /// When the control group refuses one.
    fn update(&self, limits: &Limits) -> Result<()>;

    /// The figures of its control group.
    ///
    /// # Errors
    /// When they cannot be read.
    fn stats(&self) -> Result<Stats>;

    /// Blocks until the machine has ended, its console output is written and its process is reaped.
    fn wait(&self) -> Exit;

    /// Frees what it held on the host. Called once, after [`Instance::wait`] has returned.
    ///
    /// # Errors
    /// When something cannot be removed; what can be is.
    fn delete(&self) -> Result<()>;
}

/// What a container's machine is to be made from.
#[derive(Clone, Copy, Debug)]
pub struct Rootfs<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// Source directory of the rootfs mount.
    pub source: &'a Path,
    /// Directory of a checkpoint to go on from. Whoever gave it may remove it once the container is created.
    pub checkpoint: Option<&'a Path>,
}

/// A rootfs mount that has turned out to be a machine's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Record of its files.
    pub record: PathBuf,
    /// The arguments that a container of the image has when its user gives none.
    pub args: Vec<String>,
}

/// Makes machines.
pub trait Maker: Send + Sync + 'static {
    /// Turns a rootfs mount into something to start from; `progress` gets a sentence for each step.
    ///
    /// # Errors
    /// When the directory is not that of a virtual machine image, or the checkpoint none of such a machine.
    fn resolve(&self, rootfs: &Rootfs, progress: &dyn Fn(&str)) -> Result<Image>;

    /// Makes a machine from `record`. The calling thread lives until the machine has ended.
    ///
    /// # Errors
    /// When the spec, the image or the host does not allow it; nothing is left behind.
    fn create(&self, spec: CreateSpec, record: &Path) -> Result<Arc<dyn Instance>>;
}
