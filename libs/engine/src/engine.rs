//! The engine: makes machines, and cleans up after those whose engine died.

use ovms_config::Settings;

use crate::error::{Error, Kind, Result};
use crate::machine::{ExitInfo, Machine};
use crate::record::Record;
use crate::spec::CreateSpec;

/// Makes machines. Cheap to clone; holds no lock and no thread of its own.
#[derive(Clone, Debug)]
pub struct Engine {
    settings: Settings,
}

impl Engine {
    /// An engine with the host's settings.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// Builds a machine up to the point where only [`Machine::start`] is missing: its VMM lives, in its jail, its
    /// cgroup and its network namespace.
    ///
    /// # Errors
    /// Every kind; nothing is left behind.
    pub fn create(&self, spec: CreateSpec) -> Result<Machine> {
        let _ = (&self.settings, spec);
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Reads a machine's record, whoever made the machine.
    ///
    /// # Errors
    /// `NotFound`, `Internal`.
    pub fn load(&self, namespace: &str, id: &str) -> Result<Record> {
        let _ = (namespace, id);
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }

    /// Ends and removes a machine from its record alone, for when its own engine is gone (`shim delete`): kills the VMM
    /// if it still is the process that the record means, removes cgroup, uid lease and record. Idempotent: `None` if
    /// there is no such machine.
    ///
    /// # Errors
    /// `Internal`.
    pub fn cleanup(&self, namespace: &str, id: &str) -> Result<Option<ExitInfo>> {
        let _ = (namespace, id);
        Err(Error::new(Kind::Unavailable, "not built yet"))
    }
}
