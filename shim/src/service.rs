//! ttrpc around [`Tasks`]: decode, one call, encode. What changes a container runs on a task of its own, so that a
//! connection that breaks or a deadline that passes cannot leave it half done.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status as ApiStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::shim_async::{create_task, Task};
use ttrpc::asynchronous::{Service as TtrpcService, TtrpcContext};

use crate::error::{Error, Kind, Result};
use crate::events::timestamp;
use crate::stdio::Stdio;
use crate::task::{CheckpointRequest, CreateRequest, Snapshot, Status, Tasks};

/// The names under which the same service answers: containerd up to 2.2 and for plain addresses speaks v2, v3 differs
/// in its name alone.
const NAMES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// Name of the options of a checkpoint.
const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";

/// The task service as ttrpc knows it.
pub struct Service {
    tasks: Arc<Tasks>,
}

impl Service {
    /// The dispatch tables of a task service under all its names.
    pub fn table(tasks: &Arc<Tasks>) -> HashMap<String, TtrpcService> {
        let mut table = HashMap::new();
        for name in NAMES {
            let service = Arc::new(Self { tasks: tasks.clone() });
            // The crate makes one entry, under the name of its own version.
            table.extend(create_task(service).into_values().map(|methods| (name.to_owned(), methods)));
        }
        table
    }

    /// Runs `work` to its end, whoever waits for it.
    async fn whole<T, F>(&self, work: impl FnOnce(Arc<Tasks>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let done = tokio::spawn(work(self.tasks.clone())).await;
        Ok(done.unwrap_or_else(|error| Err(Error::caused("a task of the shim has failed", error)))?)
    }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _ctx: &TtrpcContext, req: StateRequest) -> ttrpc::Result<StateResponse> {
        let snapshot = self.tasks.state(&req.id, &req.exec_id)?;
        Ok(state_response(req, snapshot))
    }

    async fn create(&self, _ctx: &TtrpcContext, req: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let request = CreateRequest {
            id: req.id,
            bundle: req.bundle.into(),
            rootfs: req.rootfs,
            stdio: Stdio { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal },
            checkpoint: req.checkpoint,
        };
        let pid = self.whole(|tasks| async move { tasks.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _ctx: &TtrpcContext, req: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self.whole(|tasks| async move { tasks.start(&req.id, &req.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _ctx: &TtrpcContext, req: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = self.whole(|tasks| async move { tasks.delete(&req.id, &req.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn pids(&self, _ctx: &TtrpcContext, req: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.tasks.pids(&req.id)?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _ctx: &TtrpcContext, req: PauseRequest) -> ttrpc::Result<Empty> {
        self.whole(|tasks| async move { tasks.pause(&req.id).await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _ctx: &TtrpcContext, req: ResumeRequest) -> ttrpc::Result<Empty> {
        self.whole(|tasks| async move { tasks.resume(&req.id).await }).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _ctx: &TtrpcContext, req: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let request = checkpoint_request(&req)?;
        self.whole(|tasks| async move { tasks.checkpoint(&req.id, request).await }).await?;
        Ok(Empty::default())
    }

    async fn kill(&self, _ctx: &TtrpcContext, req: KillRequest) -> ttrpc::Result<Empty> {
        self.whole(|tasks| async move { tasks.kill(&req.id, &req.exec_id, req.signal).await }).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _ctx: &TtrpcContext, req: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.tasks.exec(&req.id)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _ctx: &TtrpcContext, req: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.tasks.resize(&req.id, &req.exec_id, req.width, req.height).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _ctx: &TtrpcContext, req: CloseIORequest) -> ttrpc::Result<Empty> {
        self.tasks.close_io(&req.id, &req.exec_id, req.stdin)?;
        Ok(Empty::default())
    }

    async fn update(&self, _ctx: &TtrpcContext, req: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let Some(resources) = req.resources.into_option() else {
            return Err(Error::new(Kind::Invalid, "the update names no resources").into());
        };
        self.whole(|tasks| async move { tasks.update(&req.id, &resources.value).await }).await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _ctx: &TtrpcContext, req: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.tasks.wait(&req.id, &req.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn stats(&self, _ctx: &TtrpcContext, req: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.tasks.stats(&req.id).await?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _ctx: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.tasks.connect(&req.id),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _ctx: &TtrpcContext, _req: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.tasks.shutdown();
        Ok(Empty::default())
    }
}

/// The options are runc's whatever the runtime is; containerd 1.7 sends none.
fn checkpoint_request(req: &CheckpointTaskRequest) -> Result<CheckpointRequest> {
    let mut request = CheckpointRequest { dir: req.path.clone().into(), exit: false };
    let Some(options) = req.options.as_ref().filter(|options| !options.value.is_empty()) else { return Ok(request) };
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if name != CHECKPOINT_OPTIONS {
        let message = format!("options of type {name:?} are not known for a checkpoint: leave them out");
        return Err(Error::new(Kind::Invalid, message));
    }
    let options = CheckpointOptions::parse_from_bytes(&options.value)
        .map_err(|e| Error::caused("the options of the checkpoint cannot be read", e).of_kind(Kind::Invalid))?;
    if !options.image_path.is_empty() {
        request.dir = options.image_path.into();
    }
    request.exit = options.exit;
    Ok(request)
}

fn state_response(req: StateRequest, snapshot: Snapshot) -> StateResponse {
    let status = match snapshot.status {
        Status::Created => ApiStatus::CREATED,
        Status::Running => ApiStatus::RUNNING,
        Status::Paused => ApiStatus::PAUSED,
        Status::Stopped => ApiStatus::STOPPED,
    };
    let Stdio { stdin, stdout, stderr, terminal } = snapshot.stdio;
    StateResponse {
        id: req.id,
        exec_id: req.exec_id,
        bundle: snapshot.bundle.to_string_lossy().into_owned(),
        pid: snapshot.pid,
        status: status.into(),
        stdin,
        stdout,
        stderr,
        terminal,
        exit_status: snapshot.exit.map_or(0, |exit| exit.status),
        exited_at: snapshot.exit.map(|exit| timestamp(exit.at)).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::any;

    fn asked(options: Option<containerd_shim_protos::protobuf::well_known_types::any::Any>) -> CheckpointTaskRequest {
        CheckpointTaskRequest { path: "/tmp/ctrd-checkpoint1".into(), options: options.into(), ..Default::default() }
    }

    #[test]
    fn a_checkpoint_without_options_fills_the_path() {
        let request = checkpoint_request(&asked(None)).unwrap();
        assert_eq!(request, CheckpointRequest { dir: "/tmp/ctrd-checkpoint1".into(), exit: false });
        let empty = any(CHECKPOINT_OPTIONS, &CheckpointOptions::default());
        assert_eq!(checkpoint_request(&asked(Some(empty))).unwrap(), request);
    }

    #[test]
    fn the_options_of_a_checkpoint_name_a_directory_and_an_exit() {
        let options = CheckpointOptions { exit: true, image_path: "/srv/vm1".into(), ..Default::default() };
        let request = checkpoint_request(&asked(Some(any(CHECKPOINT_OPTIONS, &options)))).unwrap();
        assert_eq!(request, CheckpointRequest { dir: "/srv/vm1".into(), exit: true });
    }

    #[test]
    fn checkpoint_with_strange_options_returns_invalid() {
        let options = CheckpointOptions { exit: true, ..Default::default() };
        let mut broken = any(CHECKPOINT_OPTIONS, &options);
        broken.value = vec![0xff];
        for options in [any("acme.CheckpointOptions", &options), broken] {
            assert_eq!(checkpoint_request(&asked(Some(options))).unwrap_err().kind(), Kind::Invalid);
        }
    }
}
