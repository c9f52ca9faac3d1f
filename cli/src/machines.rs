//! Machines by the names that users give them: `ID` or `NAMESPACE/ID`, whoever runs them.

use std::time::SystemTime;

use ovms_config::Settings;
use ovms_engine::{Engine, ExitInfo, ProcessId, Record, State};

use crate::error::CliError;
use crate::run::instance::{Ended, Kept};
use crate::run::NAMESPACE;

/// A machine that somebody runs, or one of `ovm run -d` that has ended.
pub struct Machine {
    /// Its namespace: `ovm`, or one of containerd's.
    pub namespace: String,
    /// Its name.
    pub id: String,
    /// The engine's record; none once it has ended.
    pub record: Option<Record>,
    /// Its files, if `ovm run` made them.
    pub files: Option<Kept>,
}

impl Machine {
    /// `NAMESPACE/ID`
    pub fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.id)
    }

    fn ended(&self) -> Option<&Ended> {
        self.files.as_ref().and_then(|files| files.ended.as_ref())
    }

    /// Its state as people say it.
    pub fn state(&self) -> &'static str {
        match self.record.as_ref().filter(|record| is_there(record)).map(|record| record.state) {
            None if self.record.is_some() => "lost",
            Some(State::Creating) => "creating",
            Some(State::Created) => "created",
            Some(State::Running) => "running",
            Some(State::Paused) => "paused",
            Some(State::Stopped) | None => "stopped",
        }
    }

    /// Whether its guest is there.
    pub fn lives(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.state != State::Stopped && is_there(record))
    }

    /// How it ended.
    pub fn exit(&self) -> Option<&ExitInfo> {
        let record = self.record.as_ref().and_then(|record| record.exit.as_ref());
        record.or(self.ended().map(|ended| &ended.exit))
    }

    /// What its image was called, where that is known.
    pub fn image(&self) -> Option<&str> {
        self.files.as_ref().map(|files| files.origin.name.as_str())
    }

    /// vCPUs and bytes of memory.
    pub fn size(&self) -> (u32, u64) {
        let record = self.record.as_ref().map(|record| (record.vcpus, record.memory));
        record.or(self.ended().map(|ended| (ended.vcpus, ended.memory))).unwrap_or_default()
    }

    /// When it was made.
    pub fn created(&self) -> Option<SystemTime> {
        self.record.as_ref().map(|record| record.created).or(self.ended().map(|ended| ended.created))
    }
}

/// Whether a machine's VMM is there: a record may outlive it by a crash of who wrote it. One that ended is as it says.
fn is_there(record: &Record) -> bool {
    record.state == State::Stopped || record.process.is_none_or(ProcessId::is_alive)
}

/// Every machine, by namespace and name.
pub fn all(settings: &Settings) -> Vec<Machine> {
    let mut files = Kept::all(&settings.paths.state);
    let mut machines: Vec<Machine> = Vec::new();
    for record in Engine::new(settings.clone()).list() {
        let (namespace, id) = (record.namespace.clone(), record.id.clone());
        let ours = files.iter().position(|files| namespace == NAMESPACE && files.id == id);
        let files = ours.map(|at| files.swap_remove(at));
        machines.push(Machine { namespace, id, record: Some(record), files });
    }
    // One without a record and without an end was killed with its process; the next start sweeps it away.
    for files in files.into_iter().filter(|files| files.ended.is_some()) {
        machines.push(Machine { namespace: NAMESPACE.into(), id: files.id.clone(), record: None, files: Some(files) });
    }
    machines.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    machines
}

/// The machine of that name.
///
/// # Errors
/// None has it, or several have, in several namespaces.
pub fn find(settings: &Settings, name: &str) -> Result<Machine, CliError> {
    let mut found: Vec<Machine> = match name.split_once('/') {
        Some((namespace, id)) => all(settings).into_iter().filter(|m| m.namespace == namespace && m.id == id).collect(),
        None => all(settings).into_iter().filter(|m| m.id == name).collect(),
    };
    if found.len() > 1 {
        let names: Vec<String> = found.iter().map(Machine::name).collect();
        return Err(CliError::invalid(format!("several machines are called {name}: say which ({})", names.join(", "))));
    }
    found.pop().ok_or_else(|| CliError::not_found(format!("there is no machine {name}: ovm ps lists them")))
}
