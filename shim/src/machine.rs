//! The real machines behind the seam: the engine's.

use std::path::Path;
use std::sync::Arc;

use ovms_config::Settings;
use ovms_engine::{CreateSpec, Engine, Limits, Machine, SnapshotOptions, Stats};
use tracing::info;

use crate::error::{Error, Kind, Result};
use crate::instance::{Exit, Image, Instance, Maker, Press, Rootfs, Save};
use crate::resolve::resolve;

/// Makes machines with the engine.
#[derive(Debug)]
pub struct EngineMaker {
    engine: Engine,
    settings: Settings,
}

impl EngineMaker {
    /// With the host's settings.
    pub fn new(settings: Settings) -> Self {
        Self { engine: Engine::new(settings.clone()), settings }
    }
}

impl Maker for EngineMaker {
    fn resolve(&self, rootfs: &Rootfs, progress: &dyn Fn(&str)) -> Result<Image> {
        let own_args = [ovms_bundle::ENTRYPOINT.to_owned()];
        resolve(&self.settings.paths.bundle_socket, rootfs, &own_args, progress)
    }

    fn create(&self, mut spec: CreateSpec, record: &Path) -> Result<Arc<dyn Instance>> {
        spec.bundle = record.to_owned();
        Ok(Arc::new(EngineMachine(self.engine.create(spec)?)))
    }
}

struct EngineMachine(Machine);

impl Instance for EngineMachine {
    fn pid(&self) -> u32 {
        self.0.pid()
    }

    fn start(&self) -> Result<()> {
        Ok(self.0.start()?)
    }

    fn press(&self, what: Press) -> Result<()> {
        match what {
            Press::PowerButton => self.0.power_button()?,
            Press::Kill => self.0.kill()?,
        }
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        Ok(self.0.pause()?)
    }

    fn resume(&self) -> Result<()> {
        Ok(self.0.resume()?)
    }

    fn save(&self, dir: &Path, how: Save, wanted: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        // The archive that containerd makes of the directory has no place for what the machine was restored from.
        let options = SnapshotOptions { full: true, stop: how.stop };
        let mut progress = |step: &str| info!(id = self.0.id(), "{step}");
        self.0.snapshot(dir, options, &mut progress, &|| !wanted())?;
        Ok(())
    }

    fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        Ok(self.0.resize_console(columns, rows)?)
    }

    fn update(&self, limits: &Limits) -> Result<()> {
        Ok(self.0.update(limits)?)
    }

    fn stats(&self) -> Result<Stats> {
        Ok(self.0.stats()?)
    }

    fn wait(&self) -> Exit {
        let exit = self.0.wait();
        Exit { status: exit.status, at: exit.at, oom: exit.oom_killed }
    }

    fn delete(&self) -> Result<()> {
        self.0.delete()?;
        Ok(())
    }
}

impl From<ovms_engine::Error> for Error {
    fn from(error: ovms_engine::Error) -> Self {
        let kind = match error.kind() {
            ovms_engine::Kind::NotFound => Kind::NotFound,
            ovms_engine::Kind::AlreadyExists => Kind::AlreadyExists,
            ovms_engine::Kind::InvalidArgument => Kind::Invalid,
            ovms_engine::Kind::FailedPrecondition => Kind::Precondition,
            ovms_engine::Kind::Unavailable => Kind::Unavailable,
            ovms_engine::Kind::Internal => Kind::Internal,
        };
        Error::new(kind, error.chain())
    }
}
