//! Create: from a bundle to a machine whose VMM lives and whose vCPUs stand still. Everything that can be refused is
//! refused before the VMM is spawned, and what fails after that leaves nothing behind.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::types::mount::Mount;
use ovms_engine::{BootChoice, CreateSpec, OnIncompatible};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::container::Container;
use super::{Slot, Tasks};
use crate::bootstrap::Note;
use crate::error::{Error, Kind, Result};
use crate::events::Event;
use crate::instance::{Press, Rootfs};
use crate::oci::{self, Plan};
use crate::stdio::{Stdio, Streams};

/// What containerd asks for.
#[derive(Clone, Default)]
pub struct Request {
    /// Id of the container.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Mounts that would make its root file system.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub stdio: Stdio,
    /// Directory of a checkpoint to start from; empty: none.
    pub checkpoint: String,
}

impl Tasks {
    /// Creates a container and gives the pid of its VMM.
    ///
    /// # Errors
    /// [`Kind::AlreadyExists`], [`Kind::Invalid`] for a spec or rootfs that cannot be run, what the machine says.
    pub async fn create(self: &Arc<Self>, request: Request) -> Result<u32> {
        let reserved = self.reserve(&request.id)?;
        let (answer, made) = oneshot::channel();
        // The kernel ends a VMM with the thread that spawned it, so this thread stays until the machine has ended.
        std::thread::Builder::new()
            .name("machine".into())
            .spawn(move || {
                let tasks = reserved.tasks.clone();
                match tasks.make(&request) {
                    Ok(container) => {
                        reserved.fill(container.clone());
                        // Nobody need be waiting any more.
                        let _ = answer.send(Ok(container.pid));
                        container.finish(container.instance.wait(), &tasks.events);
                    }
                    Err(error) => {
                        drop(reserved);
                        let _ = answer.send(Err(error));
                    }
                }
            })
            .map_err(|e| Error::caused("cannot start the machine's thread", e))?;
        made.await.unwrap_or_else(|_| Err(Error::new(Kind::Internal, "the machine's thread has failed")))
    }

    fn make(&self, request: &Request) -> Result<Arc<Container>> {
        let began = Instant::now();
        let plan = oci::read(&request.bundle)?;
        for warning in &plan.warnings {
            warn!(id = request.id, "{warning}");
        }
        let source = rootfs_source(&request.rootfs)?;
        let progress = |step: &str| info!(id = request.id, "{step}");
        let checkpoint = Some(Path::new(&request.checkpoint)).filter(|dir| !dir.as_os_str().is_empty());
        let rootfs = Rootfs { namespace: &self.namespace, id: &request.id, source: &source, checkpoint };
        let image = self.maker.resolve(&rootfs, &progress)?;
        let resolved = Instant::now();
        check_args(&plan.args, &image.args)?;
        let _making = self.begin()?;
        let (streams, console) = Streams::open(&request.stdio, &self.namespace, &request.id)?;
        let hooks = plan.hooks.clone();
        let spec = CreateSpec {
            began: Some(began),
            passed: vec![("resolved".into(), resolved)],
            instance: Note::read(&request.bundle).map(|note| note.instance),
            ..spec_of(plan, request, &self.namespace, console)
        };
        let instance = self.maker.create(spec, &image.record)?;
        let container = Arc::new(Container::new(
            request.id.clone(),
            request.bundle.clone(),
            request.stdio.clone(),
            instance,
            hooks,
            streams,
        ));
        let hooked = container.hooks.create_runtime(&container.id, container.pid);
        if let Err(error) = hooked.and_then(|()| self.still_open()) {
            undo(&container);
            return Err(error);
        }
        self.events.publish(created(request, container.pid));
        Ok(container)
    }

    /// From here on something is left on the host until the machine is made or undone.
    fn begin(&self) -> Result<Begun<'_>> {
        self.still_open()?;
        self.making.send_modify(|making| making.count += 1);
        let begun = Begun(self);
        // It may have been closed in between; then nobody waits for this one.
        self.still_open()?;
        Ok(begun)
    }

    /// An error once the shim ends.
    fn still_open(&self) -> Result<()> {
        if self.making.borrow().closed {
            return Err(Error::new(Kind::Unavailable, "the shim ends: containerd has given up this container"));
        }
        Ok(())
    }

    /// Takes a name, or says that it is taken.
    fn reserve(self: &Arc<Self>, id: &str) -> Result<Reserved> {
        let mut map = self.map();
        if map.contains_key(id) {
            return Err(Error::new(Kind::AlreadyExists, format!("container {id} exists already")));
        }
        map.insert(id.to_owned(), Slot::Creating);
        Ok(Reserved { tasks: self.clone(), id: id.to_owned(), filled: false })
    }
}

/// Counts a machine that is being made.
struct Begun<'a>(&'a Tasks);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.making.send_modify(|making| making.count -= 1);
    }
}

/// A name that is given back unless a container takes it.
struct Reserved {
    tasks: Arc<Tasks>,
    id: String,
    filled: bool,
}

impl Reserved {
    fn fill(mut self, container: Arc<Container>) {
        self.tasks.map().insert(self.id.clone(), Slot::Ready(container));
        self.filled = true;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.filled {
            self.tasks.map().remove(&self.id);
        }
    }
}

/// The directory behind the rootfs mount; the snapshotter knows what it means.
fn rootfs_source(mounts: &[Mount]) -> Result<PathBuf> {
    const WAY_OUT: &str = "add `--snapshotter ovms` (or set CONTAINERD_SNAPSHOTTER=ovms, or snapshotter = \"ovms\" in \
                           nerdctl.toml or containerd's runtime section) and pull the image with it";
    let refused = |what: String| Error::new(Kind::Invalid, format!("{what}: {WAY_OUT}"));
    let mount = match mounts {
        [mount] => mount,
        [] => return Err(refused("the container has no rootfs mount from the ovms snapshotter".into())),
        _ => return Err(refused("the container's rootfs was not made by the ovms snapshotter".into())),
    };
    let is_bind = mount.type_ == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind");
    if !is_bind {
        return Err(refused(format!(
            "the container's rootfs is a mount of type {}: either its image was unpacked by another snapshotter, or it \
             is an ordinary container image, which this runtime does not start",
            mount.type_
        )));
    }
    Ok(mount.source.clone().into())
}

/// Without an agent nothing but the image's own start can be started.
pub(crate) fn check_args(asked: &[String], own: &[String]) -> Result<()> {
    if asked == own {
        return Ok(());
    }
    Err(Error::new(
        Kind::Invalid,
        format!(
            "process.args of the container's spec: {asked:?} cannot be run: the image has no agent that could start \
             programs in the virtual machine (leave out the arguments behind the container's id)"
        ),
    ))
}

pub(crate) fn spec_of(plan: Plan, request: &Request, namespace: &str, console: ovms_engine::Stdio) -> CreateSpec {
    CreateSpec {
        id: request.id.clone(),
        namespace: namespace.to_owned(),
        wishes: plan.wishes,
        extra_kernel_args: plan.kernel_args,
        read_only: plan.read_only,
        stdio: console,
        cgroups_path: plan.cgroups_path,
        limits: plan.limits,
        netns: plan.netns,
        hostname: plan.hostname,
        oom_score_adj: plan.oom_score_adj,
        // The spec of a checkpoint is that of the machine it was taken of, which may have had to boot.
        boot: if plan.cold && request.checkpoint.is_empty() { BootChoice::Cold } else { BootChoice::Auto },
        on_incompatible: if plan.boot_if_incompatible { OnIncompatible::Boot } else { OnIncompatible::Refuse },
        ..CreateSpec::default()
    }
}

fn undo(container: &Container) {
    let instance = &container.instance;
    if let Err(error) = instance.press(Press::Kill) {
        warn!(id = container.id, error = error.chain(), "cannot kill a machine whose hook has failed");
    }
    instance.wait();
    container.hooks.poststop(&container.id);
    if let Err(error) = instance.delete() {
        warn!(id = container.id, error = error.chain(), "cannot free everything that a machine held");
    }
}

fn created(request: &Request, pid: u32) -> Event {
    let Stdio { stdin, stdout, stderr, terminal } = request.stdio.clone();
    Event::Create(TaskCreate {
        container_id: request.id.clone(),
        bundle: path_text(&request.bundle),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO { stdin, stdout, stderr, terminal, ..Default::default() }),
        checkpoint: request.checkpoint.clone(),
        pid,
        ..Default::default()
    })
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
