//! The diff service: `Apply` unpacks a layer into a snapshot of ours, `Diff` makes a layer of one.
//!
//! ```text
//!  Apply(blob, mounts) ── not ours? ──> unimplemented, and containerd asks its next differ
//!        │ ours
//!        ├─ ordinary ──> decompress ──> untar into fs/            (crate::ordinary)
//!        └─ a machine's ──> sandboxed worker ──> layer/           (crate::machine)
//! ```
//! Ours are known by the store alone: mounts whose writes end in the `fs` directory of an active snapshot.

use std::sync::Arc;

use ovms_artifact::media;
use tonic::{async_trait, Request, Response, Status};

use crate::daemon::Daemon;
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::mounts;
use crate::ordinary::{self, Applied, Found};
use crate::proto::diff::diff_server::Diff;
use crate::proto::diff::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use crate::store::{Chain, Content, Kind};
use ovms_containerd::proto::types::{Descriptor, Mount};
use ovms_containerd::Scope;

/// The service.
#[derive(Debug)]
pub struct DiffService(pub Arc<Daemon>);

impl DiffService {
    /// The snapshot whose directory these mounts end in; `None` if it is not ours.
    async fn target(&self, mounts: Vec<Mount>) -> Result<Option<Chain>> {
        self.0
            .blocking(move |daemon| {
                let number = mounts::target(&mounts).and_then(|dir| daemon.layout.number_of(dir));
                Ok(number.map(|number| daemon.store.chain_of(number)).transpose()?.flatten())
            })
            .await
    }

    /// The machine whose disk a diff is wanted of; `None` if neither side is a machine's.
    async fn machine(&self, left: Vec<Mount>, right: Vec<Mount>) -> Result<Option<Chain>> {
        let (left, right) = (self.target(left).await?, self.target(right).await?);
        let machines = |chain: &Chain| chain.record.content != Content::Files;
        match (left.filter(machines), right.filter(machines)) {
            (None, None) => Ok(None),
            (Some(left), Some(right))
                if right.record.kind == Kind::Active
                    && left.record.kind == Kind::View
                    && left.record.parent == right.record.parent =>
            {
                Ok(Some(right))
            }
            // Another differ would compare empty directories and find nothing.
            _ => Err(Error::invalid(
                "a diff of machines is that of a container's snapshot to its parent (`ctr snapshots diff KEY`)",
            )),
        }
    }

    async fn apply_layer(&self, scope: &Scope, descriptor: &Descriptor, chain: Chain) -> Result<Applied> {
        let Some(compression) = media::layer_compression(&descriptor.media_type) else {
            return Err(not_ours(format!("media type {:?} is not that of a layer", descriptor.media_type)));
        };
        let annotated = descriptor.annotations.contains_key(media::ANNOTATION_FORMAT);
        let machine_below = chain.record.content != Content::Files;
        if annotated && !machine_below && !chain.parents.is_empty() {
            return Err(Error::invalid(format!(
                "disk layer {} lies above layers of an ordinary image: a machine's image holds disk layers only",
                descriptor.digest
            )));
        }
        if !annotated && !machine_below {
            let (reader, _transfer) = self.0.containerd.read_blob(scope, &descriptor.digest).await?;
            let blob = ordinary::Blob::new(reader, descriptor, compression, &self.0.settings.limits)?;
            let first = chain.parents.is_empty();
            let at = chain.clone();
            let found = self.0.blocking(move |daemon| ordinary::apply(daemon, &at, blob, first)).await?;
            match found {
                Found::Applied(applied) => return Ok(applied),
                Found::Machine => {}
            }
        }
        crate::machine::apply(&self.0, scope, descriptor, &chain).await
    }
}

/// The answer that sends containerd to its next differ.
fn not_ours(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unimplemented, message)
}

#[async_trait]
impl Diff for DiffService {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let scope = Scope::of(request.metadata());
        let ApplyRequest { diff, mounts, sync_fs, .. } = request.into_inner();
        let Some(descriptor) = diff else { return Err(Error::invalid("there is no layer to apply").into()) };
        let active = self.target(mounts).await?.filter(|chain| chain.record.kind == Kind::Active);
        let Some(chain) = active else {
            return Err(not_ours("the mounts are not those of a snapshot of ovms").into());
        };
        let started = std::time::Instant::now();
        let number = chain.record.number;
        let applied = self.apply_layer(&scope, &descriptor, chain).await.inspect_err(|err| {
            tracing::warn!(digest = descriptor.digest, error = err.chain(), "a layer cannot be applied");
        })?;
        if sync_fs {
            self.0.blocking(move |daemon| daemon.sync_snapshot(number)).await?;
        }
        tracing::info!(digest = descriptor.digest, number, bytes = applied.size, took = ?started.elapsed(), "layer applied");
        let applied = Descriptor {
            media_type: media::OCI_LAYER.into(),
            digest: applied.diff_id.to_string(),
            size: i64::try_from(applied.size).unwrap_or(i64::MAX),
            annotations: Default::default(),
        };
        Ok(Response::new(ApplyResponse { applied: Some(applied) }))
    }

    async fn diff(&self, request: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        let scope = Scope::of(request.metadata());
        let request = request.into_inner();
        let Some(chain) = self.machine(request.left.clone(), request.right.clone()).await? else {
            return Err(not_ours("the mounts are not those of a machine of ovms").into());
        };
        let diff = crate::machine::diff(&self.0, &scope, request, &chain).await?;
        Ok(Response::new(DiffResponse { diff: Some(diff) }))
    }
}
