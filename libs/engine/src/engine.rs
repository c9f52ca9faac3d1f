//! The engine: makes machines, and cleans up after those whose engine died.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ovms_config::Settings;
use ovms_proto::control::{ExitReason, FailureKind};
use ovms_proto::ChannelError;

use crate::ahead::Ahead;
use crate::cgroup::{self, Bounds};
use crate::error::{Error, Kind, Result};
use crate::launch::Packet;
use crate::machine::{with_overhead, ExitInfo, Machine, DEATH};
use crate::monitor;
use crate::process::{self, find_vmm};
use crate::record::{self, check_name, Claim, Found, Record, Slot};
use crate::reservation::Reservation;
use crate::serve::Server;
use crate::shared::{micros, Inner, Parts, Patience, Remains};
use crate::spec::{BootChoice, CreateSpec, OnIncompatible};
use crate::uid::{self, UidLease};

/// How long a VMM may take to build a machine. On real hardware it takes milliseconds; an emulated host and a kernel
/// and initial RAM disk that are read from a cold disk need more.
const CONFIGURE: Duration = Duration::from_secs(60);

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
    pub fn create(&self, mut spec: CreateSpec) -> Result<Machine> {
        spec.began.get_or_insert_with(Instant::now);
        let reservation = self.reserve(&spec)?;
        self.create_in(reservation, spec)
    }

    /// Takes the name of a machine whose files its maker may still be making, makes its cgroup and spawns its VMM: of the
    /// spec, only names, cgroup, network namespace and `instance` are used.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`, `Unavailable`, `FailedPrecondition`, `Internal`; nothing is left behind.
    pub fn reserve(&self, spec: &CreateSpec) -> Result<Reservation> {
        check_name("the machine's id", &spec.id)?;
        check_name("the namespace", &spec.namespace)?;
        let cgroup_path = match &spec.cgroups_path {
            Some(path) if !path.is_empty() => cgroup::parse_path(path)?,
            _ => PathBuf::from(format!("ovms/{}-{}", spec.namespace, spec.id)),
        };
        let vmm = find_vmm(&self.settings)?;
        let ahead = Ahead::begin(&self.settings.paths.kvm, spec.netns.as_deref())?;
        Reservation::make(spec, self.claim(spec)?, &cgroup_path, &vmm, ahead)
    }

    /// [`Engine::create`] with what was reserved for this spec.
    ///
    /// # Errors
    /// Every kind; nothing is left behind, of the reservation neither.
    pub fn create_in(&self, reservation: Reservation, spec: CreateSpec) -> Result<Machine> {
        if spec.on_incompatible == OnIncompatible::Refuse || spec.boot == BootChoice::Cold {
            return self.attempt(reservation, spec);
        }
        let spare = spec.try_clone().map_err(Error::io("the console cannot be shared"))?;
        match self.attempt(reservation, spec) {
            Err(err) if err.is_incompatible() => {
                tracing::warn!(
                    id = spare.id,
                    err = err.chain(),
                    "the machine boots, since this host cannot resume its RAM"
                );
                let mut passed = spare.passed.clone();
                passed.push(("cold boot instead".into(), Instant::now()));
                let spec = CreateSpec { boot: BootChoice::Cold, passed, ..spare };
                self.attempt(self.reserve(&spec)?, spec)
            }
            other => other,
        }
    }

    fn attempt(&self, reservation: Reservation, mut spec: CreateSpec) -> Result<Machine> {
        let mut uid = UidLease::take(&self.settings.paths.runtime, &self.settings.jail)?;
        // In the order in which they were made: on an error they go the other way, the VMM first.
        let Reservation { slot, cgroup, born, ahead, mut record, passed } = reservation;
        if (&record.namespace, &record.id) != (&spec.namespace, &spec.id) {
            return Err(Error::new(Kind::Internal, "what was reserved is another machine's"));
        }
        let began = spec.began.unwrap_or_else(Instant::now);
        let since = |at: Instant| micros(at.saturating_duration_since(began));
        let steps = spec.passed.drain(..).chain(passed);
        let mut timeline: Vec<_> = steps.map(|(step, at)| (step, since(at))).collect();
        let mut packet = Packet::open(&mut spec, ahead, &self.settings)?;
        (packet.config.jail.uid, packet.config.jail.gid) = (uid.uid(), uid.uid());
        timeline.push(("files".to_owned(), micros(began.elapsed())));
        let bounds = bounds(&spec, &packet, self.settings.vm.overhead);
        cgroup.get()?.apply(&bounds)?;
        timeline.push(("limits".to_owned(), micros(began.elapsed())));
        let process = born.get()?.process.id();
        uid.assign(process)?;
        (record.process, record.uid, record.tops) = (Some(process), Some(uid.uid()), std::mem::take(&mut packet.tops));
        (record.vcpus, record.memory) = (packet.size.vcpus, packet.size.memory);
        slot.get()?.write(&record)?;
        // What is left to do here is done beside the VMM's own work.
        let sent = born.get()?.channel.send(&packet.config, &packet.fds());
        let (memory, origin) = (packet.size.memory, std::mem::take(&mut packet.origin));
        let (ram_lock, recording) = (packet.ram_lock.take(), packet.recording.take());
        // The VMM has its own copies now: the lock on the disk and the ends of the console live and die with them.
        drop(packet);
        timeline.push(("configuration sent".to_owned(), micros(began.elapsed())));
        let server = Server::listen(&record::socket(self.runtime(), &spec.namespace, &spec.id))?;
        let oom = cgroup.get()?.watch_oom();
        let born = born.take()?;
        let parts = Parts {
            process: born.process,
            channel: born.channel,
            memory,
            overhead: self.settings.vm.overhead,
            began,
            patience: Patience::default(),
            timeline,
            stderr: spec.stdio.stderr.take(),
            origin,
            ram_lock,
            recording,
            cgroup: cgroup.take()?,
            remains: Remains { slot: slot.take()?, record, _uid: uid },
        };
        let inner = Arc::new(Inner::new(parts));
        if let Err(err) = monitor::start(Arc::clone(&inner), oom, born.log, Some(server)) {
            inner.fault("the machine's thread cannot be started");
            inner.process.reap();
            cgroup::remove(&inner.cgroup.dirs());
            inner.release()?;
            return Err(err);
        }
        let machine = Machine::new(Arc::clone(&inner));
        match finish(&inner, sent, spec.oom_score_adj) {
            Ok(()) => Ok(machine),
            Err(err) => {
                machine
                    .destroy()
                    .inspect_err(|err| tracing::error!(err = err.chain(), "a failed machine is not removed"))?;
                Err(err)
            }
        }
    }

    /// Reads a machine's record, whoever made the machine.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument` for a name that none can have, `Internal`.
    pub fn load(&self, namespace: &str, id: &str) -> Result<Record> {
        check_name("the machine's id", id)?;
        check_name("the namespace", namespace)?;
        let record = record::read(&self.settings.paths.runtime, namespace, id)?;
        record.ok_or_else(|| Error::new(Kind::NotFound, format!("there is no machine {namespace}/{id}")))
    }

    /// Every machine's record, whoever made it.
    #[must_use]
    pub fn list(&self) -> Vec<Record> {
        record::all(&self.settings.paths.runtime)
    }

    /// Ends and removes a machine from its record alone, for when its own engine is gone (`shim delete`): kills the VMM
    /// if it still is the process that the record means, removes cgroup, uid lease and record. Only the machine that was
    /// made with `instance` ([`CreateSpec::instance`]) is meant: one that has its name by now stays. Idempotent: `None` if
    /// there is no such machine.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that none can have, `Internal`.
    pub fn cleanup(&self, namespace: &str, id: &str, instance: Option<&str>) -> Result<Option<ExitInfo>> {
        check_name("the machine's id", id)?;
        check_name("the namespace", namespace)?;
        let Some(found) = Found::open(self.runtime(), namespace, id)? else { return Ok(None) };
        match found.record()? {
            Some(record) if record.instance.is_some() && record.instance.as_deref() != instance => {
                tracing::info!(namespace, id, "the machine of this name is another one by now and stays");
                Ok(None)
            }
            record => self.remove(&found, record),
        }
    }

    /// Ends and removes the machine of a directory, whichever it is.
    fn remove(&self, found: &Found, record: Option<Record>) -> Result<Option<ExitInfo>> {
        let Some(record) = record else {
            // One that its engine has just begun to make has no record yet.
            if found.is_stale() {
                found.remove()?;
            }
            return Ok(None);
        };
        let (namespace, id) = (&record.namespace, &record.id);
        if let Some(process) = record.process {
            process::kill_recorded(process, DEATH)
                .map_err(Error::io(format!("the VMM of machine {namespace}/{id} cannot be killed")))?;
        }
        // Its engine, if it still lives, may have given the name away meanwhile; what is here now is not ours then.
        if found.is_current() {
            cgroup::remove(&record.cgroup);
        }
        if let Some(uid) = record.uid {
            let reclaimed = uid::reclaim(self.runtime(), uid);
            reclaimed.map_err(Error::io(format!("the lease of user id {uid} cannot be removed")))?;
        }
        found.remove()?;
        tracing::info!(namespace, id, "a machine without an engine was removed");
        let killed = || {
            let reason = ExitReason::Killed;
            ExitInfo { status: reason.status(), at: SystemTime::now(), reason, oom_killed: false }
        };
        Ok(Some(record.exit.unwrap_or_else(killed)))
    }

    /// Cleans up after every machine of a namespace whose engine is gone. For callers whose machines live no longer than
    /// they themselves; a failure is told to the log alone.
    pub fn sweep(&self, namespace: &str) {
        let runtime = &self.settings.paths.runtime;
        // By their directories: an engine that died at its first step has written no record.
        for id in record::names(runtime, namespace) {
            let Ok(Some(found)) = Found::open(runtime, namespace, &id) else { continue };
            if !found.is_stale() {
                continue;
            }
            let removed = found.record().and_then(|record| match record {
                // It may have been made just now and not be locked yet.
                None if !found.is_old() => Ok(None),
                record => self.remove(&found, record),
            });
            if let Err(err) = removed {
                tracing::warn!(namespace, id, err = err.chain(), "a machine without an engine stays");
            }
        }
    }

    /// Where machines and leases are noted.
    pub(crate) fn runtime(&self) -> &Path {
        &self.settings.paths.runtime
    }

    /// Takes the machine's name, cleaning up after an engine that died with it.
    fn claim(&self, spec: &CreateSpec) -> Result<Slot> {
        for _ in 0..2 {
            match Slot::claim(&self.settings.paths.runtime, &spec.namespace, &spec.id)? {
                Claim::Ours(slot) => return Ok(slot),
                Claim::Taken => break,
                Claim::Stale(found) => found.record().and_then(|record| self.remove(&found, record)).map(drop)?,
            }
        }
        Err(Error::new(Kind::AlreadyExists, format!("there is a machine {}/{} already", spec.namespace, spec.id)))
    }
}

/// Waits until the VMM, to which the configuration was `sent`, has built the machine.
fn finish(inner: &Inner, sent: std::result::Result<(), ChannelError>, oom_score_adj: Option<i32>) -> Result<()> {
    if let Some(adjustment) = oom_score_adj {
        adjust_oom_score(inner, adjustment);
    }
    let built = inner.wait_for(CONFIGURE, |shared| {
        let ended = |exit: &ExitInfo| (FailureKind::Other, format!("{:?}", exit.reason));
        let failure = || shared.failed.clone().or_else(|| shared.exit.as_ref().map(ended));
        match shared.configured {
            true => Some(Ok(())),
            false => failure().map(Err),
        }
    });
    match built {
        Some(Ok(())) => (),
        Some(Err((FailureKind::Incompatible, message))) => {
            let what =
                "this host cannot resume the machine's RAM (io.ovms.on-incompatible=boot boots it from its disk)";
            return Err(Error::new(Kind::FailedPrecondition, what).because(message).incompatible());
        }
        Some(Err((FailureKind::Other, message))) => {
            return Err(Error::new(Kind::InvalidArgument, "the VMM cannot build the machine").because(message))
        }
        None => {
            let message = format!("the VMM did not build the machine within {} s and was killed", CONFIGURE.as_secs());
            inner.fault(&message);
            return Err(Error::new(Kind::Unavailable, message));
        }
    }
    sent.map_err(|err| Error::new(Kind::Internal, "the machine's configuration cannot be sent").because(err))?;
    inner.step("configured");
    Ok(())
}

/// Lowering the score needs CAP_SYS_RESOURCE, which even root may lack; the score then stays.
fn adjust_oom_score(inner: &Inner, adjustment: i32) {
    let path = format!("/proc/{}/oom_score_adj", inner.process.id().pid);
    if let Err(err) = std::fs::write(&path, adjustment.to_string()) {
        tracing::warn!(id = inner.id, adjustment, %err, "the VMM's oom_score_adj stays as it was");
    }
}

fn bounds(spec: &CreateSpec, packet: &Packet, overhead: u64) -> Bounds {
    Bounds {
        limits: spec.limits.clone(),
        memory: Some(packet.size.cgroup_memory),
        memory_and_swap: spec.limits.memory_swap.map(|limit| with_overhead(limit, overhead)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweep_removes_what_an_engine_left_before_its_first_record_and_nothing_of_a_living_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::default();
        settings.paths.runtime = dir.path().into();
        let claim = |id| match Slot::claim(dir.path(), "ovm", id).unwrap() {
            Claim::Ours(slot) => slot,
            _ => panic!("the name {id} is free"),
        };
        drop(claim("killed"));
        let age = |id| {
            let machine = std::fs::File::open(dir.path().join("machines/ovm").join(id)).unwrap();
            machine.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        };
        age("killed");
        let _living = claim("living");
        age("living");
        // As if it were not locked yet.
        drop(claim("beginning"));

        Engine::new(settings).sweep("ovm");

        let mut left = record::names(dir.path(), "ovm");
        left.sort();
        assert_eq!(left, ["beginning", "living"]);
    }
}
