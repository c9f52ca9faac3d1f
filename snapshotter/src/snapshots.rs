//! The snapshots service: containerd's requests decoded, one call of the daemon each, the answer encoded.

use std::pin::Pin;
use std::sync::Arc;

use prost_types::Timestamp;
use tokio_stream::Stream;
use tonic::{async_trait, Request, Response, Status};

use crate::daemon::Daemon;
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::filter::{Fields, Filters};
use crate::layout;
use crate::machine;
use crate::mounts;
use crate::proto::snapshots::snapshots_server::Snapshots;
use crate::proto::snapshots::{
    self as api, CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest,
    StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest,
    UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use crate::store::{Content, Kind, Layer, NewSnapshot, Record, Time};
use ovms_containerd::proto::types::Mount;

/// Snapshots in one message of a `List` answer, as containerd's own service sends them.
const LIST_BATCH: usize = 100;

/// The service.
#[derive(Debug)]
pub struct SnapshotsService(pub Arc<Daemon>);

impl SnapshotsService {
    async fn create(&self, new: NewSnapshot) -> Result<Vec<Mount>> {
        if new.key.is_empty() {
            return Err(Error::invalid("a snapshot needs a key"));
        }
        self.0
            .blocking(move |daemon| {
                let chain = daemon.create(&new)?;
                Ok(mounts::mounts(&daemon.layout, &daemon.overlay, &chain))
            })
            .await
    }
}

#[async_trait]
impl Snapshots for SnapshotsService {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let new = NewSnapshot { kind: Kind::Active, key, parent, labels: labels.into_iter().collect() };
        Ok(Response::new(PrepareSnapshotResponse { mounts: self.create(new).await? }))
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Result<Response<ViewSnapshotResponse>, Status> {
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let new = NewSnapshot { kind: Kind::View, key, parent, labels: labels.into_iter().collect() };
        Ok(Response::new(ViewSnapshotResponse { mounts: self.create(new).await? }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = self
            .0
            .blocking(move |daemon| {
                let chain = daemon.store.chain(&key)?;
                if chain.record.kind == Kind::Committed {
                    return Err(Error::precondition(format!("snapshot {key} is committed and has no mounts")));
                }
                Ok(mounts::mounts(&daemon.layout, &daemon.overlay, &chain))
            })
            .await?;
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        if name.is_empty() {
            return Err(Error::invalid("a committed snapshot needs a name").into());
        }
        let record = self
            .0
            .blocking(move |daemon| {
                let labels = labels.into_iter().collect();
                let look = |record: &mut Record, below: Option<&Record>| machine::at_commit(daemon, record, below);
                daemon.store.commit(&key, &name, &parent, labels, look)
            })
            .await?;
        if record.content == Content::Machine(Layer::Unpacked) {
            // Whoever needs the layer waits for it; what goes wrong is recorded with the snapshot.
            let daemon = Arc::clone(&self.0);
            tokio::spawn(async move {
                if machine::finish(&daemon, record.number, &|_| ()).await.is_ok() {
                    machine::ram::ahead(daemon, record.number).await;
                }
            });
        } else if record.content == Content::Machine(Layer::Ready) {
            tokio::spawn(machine::ram::ahead(Arc::clone(&self.0), record.number));
        }
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        let left = self.0.blocking(move |daemon| daemon.remove(&key)).await?;
        // A large disk takes long to free; the key is free already, and a restart removes what a crash leaves here.
        tokio::task::spawn_blocking(move || {
            if let Err(err) = layout::remove(&left) {
                tracing::warn!(path = %left.display(), error = %err, "cannot remove what is left of a snapshot");
            }
        });
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Result<Response<StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let info = self.0.blocking(move |daemon| daemon.store.get(&key).map(|record| info(key, record))).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info: wanted, update_mask, .. } = request.into_inner();
        let Some(wanted) = wanted else { return Err(Error::invalid("an update needs a snapshot").into()) };
        let info = self
            .0
            .blocking(move |daemon| {
                let mask = update_mask.map(|mask| mask.paths).unwrap_or_default();
                let record = daemon.store.update(&wanted.name, &wanted.labels.into_iter().collect(), &mask)?;
                Ok(info(wanted.name, record))
            })
            .await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(info) }))
    }

    type ListStream = Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send>>;

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = Filters::parse(&request.into_inner().filters)
            .map_err(|err| Error::new(ErrorKind::Invalid, "the list cannot be filtered").because(err))?;
        let found: Vec<Info> = self
            .0
            .blocking(move |daemon| {
                let all = daemon.store.list()?;
                Ok(all
                    .into_iter()
                    .filter(|entry| filters.matches(entry))
                    .map(|(key, record)| info(key, record))
                    .collect())
            })
            .await?;
        let batches: Vec<_> =
            found.chunks(LIST_BATCH).map(|batch| Ok(ListSnapshotsResponse { info: batch.to_vec() })).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(batches))))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = self.0.blocking(move |daemon| daemon.usage(&key)).await?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        self.0.blocking(Daemon::cleanup).await?;
        Ok(Response::new(()))
    }
}

impl Fields for (String, Record) {
    fn field(&self, path: &[String]) -> Option<&str> {
        let (key, record) = self;
        let (first, rest) = path.split_first()?;
        match (first.as_str(), rest) {
            ("name", []) => Some(key),
            ("parent", []) => Some(&record.parent),
            ("kind", []) => Some(match record.kind {
                Kind::View => "view",
                Kind::Active => "active",
                Kind::Committed => "committed",
            }),
            // A label's own dots may stand unquoted.
            ("labels", label) if !label.is_empty() => record.labels.get(&label.join(".")).map(String::as_str),
            _ => None,
        }
    }
}

fn info(name: String, record: Record) -> Info {
    let kind = match record.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    let time = |(seconds, nanos): Time| Some(Timestamp { seconds, nanos });
    Info {
        name,
        parent: record.parent,
        kind: kind.into(),
        created_at: time(record.created),
        updated_at: time(record.updated),
        labels: record.labels.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use ovms_artifact::digest::Digest;
    use ovms_config::Settings;

    use super::*;

    /// How long anything may take.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// A service that has no containerd.
    fn service(dir: &Path) -> SnapshotsService {
        let mut settings = Settings::default();
        settings.paths.containerd_socket = dir.join("none.sock");
        settings.paths.runtime = dir.join("run");
        SnapshotsService(Daemon::open(&dir.join("root"), settings).unwrap())
    }

    impl SnapshotsService {
        /// Makes an active snapshot; nobody waits longer than [`PATIENCE`].
        async fn prepared(&self, key: &str, parent: &str) -> Record {
            let request = PrepareSnapshotRequest { key: key.into(), parent: parent.into(), ..Default::default() };
            tokio::time::timeout(PATIENCE, self.prepare(Request::new(request))).await.expect("an answer").unwrap();
            self.0.store.get(key).unwrap()
        }

        async fn committed(&self, name: &str, key: &str) {
            let request = CommitSnapshotRequest { name: name.into(), key: key.into(), ..Default::default() };
            tokio::time::timeout(PATIENCE, self.commit(Request::new(request))).await.expect("an answer").unwrap();
        }

        /// Writes what the walking differ leaves of a layer.
        async fn walked(&self, key: &str, member: &str, content: &[u8]) -> Record {
            let record = self.prepared(key, "").await;
            let path = self.0.layout.fs(record.number).join(member);
            fs::create_dir(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
            record
        }
    }

    async fn wait_for(what: &str, ready: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !ready() {
            assert!(Instant::now() < deadline, "{what} did not come");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn commit_and_prepare_answer_while_a_layer_waits_for_its_conversion() {
        let dir = tempfile::tempdir().unwrap();
        let service = service(dir.path());
        let daemon = &service.0;
        let number = service.walked("extract", "ovm/disk.raw", &[1; 4096]).await.number;
        let held = daemon.keyed.lock(machine::unpack::key(number)).await;

        service.committed("base", "extract").await;
        let container = service.prepared("vm", "base").await;

        let content = || daemon.store.get("base").unwrap().content;
        assert_eq!(content(), Content::Machine(Layer::Unpacked));
        assert_eq!(container.content, Content::Machine(Layer::Empty));
        // The conversion it was that was held back: it goes on, and fails, since this program is no worker.
        drop(held);
        wait_for("the conversion", || matches!(content(), Content::Machine(Layer::Failed(_)))).await;
    }

    #[tokio::test]
    async fn commit_and_prepare_answer_while_ram_waits_for_its_unpack() {
        let dir = tempfile::tempdir().unwrap();
        let service = service(dir.path());
        let daemon = &service.0;
        let ram = Digest::of(b"a RAM snapshot");
        let manifest = format!(
            r#"{{"schemaVersion":1,"mediaType":"application/vnd.ovms.manifest.v1+json","name":"test","version":"1","diskLayers":[{{"ref":"{ram}","format":"raw"}}],"ramSnapshot":{{"ref":"{ram}"}}}}"#
        );
        service.walked("extract", "ovm/manifest.json", manifest.as_bytes()).await;
        let key = machine::ram::key(&ram.hex());
        let held = daemon.keyed.lock(key.clone()).await;

        service.committed("image", "extract").await;
        // The work beside the pull has begun, and waits.
        wait_for("the unpack", || daemon.store.held().unwrap().contains(&key)).await;
        service.prepared("vm", "image").await;

        assert_eq!(fs::read_dir(daemon.layout.ram()).unwrap().count(), 0);
        drop(held);
    }
}
