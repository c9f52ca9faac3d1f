//! A machine that exists in memory only: it does what a test tells it and notes what it was asked.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

use ovms_engine::{CgroupVersion, CreateSpec, Limits, Stats};

use crate::error::{Error, Kind, Result};
use crate::instance::{Exit, Image, Instance, Maker, Press, Rootfs, Save};

pub(super) const PID: u32 = 4242;

#[derive(Default)]
struct State {
    exit: Option<Exit>,
    asked: Vec<String>,
    spec: Option<CreateSpec>,
    start_takes: Duration,
    fail_create: Option<Kind>,
    save: Saving,
}

/// What comes of a save.
#[derive(Clone, Copy, Default, PartialEq)]
pub(super) enum Saving {
    /// The directory is filled.
    #[default]
    Works,
    /// The disk is full.
    Fails,
    /// It takes until nobody wants it any more.
    Hangs,
}

#[derive(Clone, Default)]
pub(super) struct Stub(Arc<(Mutex<State>, Condvar)>);

impl Stub {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.0 .0.lock().unwrap());
        self.0 .1.notify_all();
        result
    }

    fn note(&self, what: impl Into<String>) {
        self.change(|state| state.asked.push(what.into()));
    }

    /// The machine ends.
    pub(super) fn end(&self, status: u32, oom: bool) {
        self.change(|state| {
            state.exit.get_or_insert(Exit { status, at: SystemTime::UNIX_EPOCH + Duration::from_secs(7), oom });
        });
    }

    /// Start takes so long from now on.
    pub(super) fn slow_start(&self, takes: Duration) {
        self.change(|state| state.start_takes = takes);
    }

    /// Create fails from now on.
    pub(super) fn fail_create(&self, kind: Kind) {
        self.change(|state| state.fail_create = Some(kind));
    }

    /// What comes of a save from now on.
    pub(super) fn saving(&self, saving: Saving) {
        self.change(|state| state.save = saving);
    }

    /// What it was asked, in order.
    pub(super) fn asked(&self) -> Vec<String> {
        self.change(|state| state.asked.clone())
    }

    /// What it was made of.
    pub(super) fn spec(&self) -> CreateSpec {
        self.change(|state| state.spec.take().unwrap())
    }
}

impl Maker for Stub {
    fn resolve(&self, rootfs: &Rootfs, progress: &dyn Fn(&str)) -> Result<Image> {
        progress("resolving");
        if let Some(checkpoint) = rootfs.checkpoint {
            self.note(format!("resolve {} over {}", checkpoint.display(), rootfs.source.display()));
        }
        Ok(Image { record: rootfs.source.join("bundle.json"), args: vec!["/ovm/boot".into()] })
    }

    fn create(&self, spec: CreateSpec, record: &Path) -> Result<Arc<dyn Instance>> {
        if let Some(kind) = self.change(|state| state.fail_create) {
            return Err(Error::new(kind, "no machine today"));
        }
        self.note(format!("create {}", record.display()));
        self.change(|state| state.spec = Some(spec));
        Ok(Arc::new(self.clone()))
    }
}

impl Instance for Stub {
    fn pid(&self) -> u32 {
        PID
    }

    fn start(&self) -> Result<()> {
        let takes = self.change(|state| state.start_takes);
        std::thread::sleep(takes);
        self.note("start");
        Ok(())
    }

    fn press(&self, what: Press) -> Result<()> {
        self.note(format!("{what:?}"));
        if what == Press::Kill {
            self.end(137, false);
        }
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        self.note("pause");
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        self.note("resume");
        Ok(())
    }

    fn save(&self, dir: &Path, how: Save, wanted: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        self.note(format!("save stop={}", how.stop));
        match self.change(|state| state.save) {
            Saving::Works => std::fs::write(dir.join("ram"), "all of it").map_err(|e| Error::caused("no", e)),
            Saving::Fails => Err(Error::new(Kind::Internal, "the disk is full")),
            Saving::Hangs => {
                while wanted() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(Error::new(Kind::Internal, "nobody wants it"))
            }
        }
    }

    fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.note(format!("resize {columns}x{rows}"));
        Ok(())
    }

    fn update(&self, limits: &Limits) -> Result<()> {
        self.note(format!("update {:?}", limits.memory));
        Ok(())
    }

    fn stats(&self) -> Result<Stats> {
        Ok(Stats {
            version: CgroupVersion::V2,
            cpu: Default::default(),
            memory: Default::default(),
            pids: Default::default(),
            io: Vec::new(),
        })
    }

    fn wait(&self) -> Exit {
        let state = self.0 .0.lock().unwrap();
        self.0 .1.wait_while(state, |state| state.exit.is_none()).unwrap().exit.unwrap()
    }

    fn delete(&self) -> Result<()> {
        self.note("delete");
        Ok(())
    }
}
