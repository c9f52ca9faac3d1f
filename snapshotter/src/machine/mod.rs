//! Snapshots that belong to a machine.

use std::sync::Arc;

use crate::containerd::Scope;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::ordinary::Applied;
use crate::proto::diff::DiffRequest;
use crate::proto::types::Descriptor;
use crate::store::Chain;

pub async fn apply(_daemon: &Arc<Daemon>, _scope: &Scope, _of: &Descriptor, _chain: &Chain) -> Result<Applied> {
    Err(Error::internal("machines are not served yet"))
}

pub async fn diff(_daemon: &Arc<Daemon>, _scope: &Scope, _request: DiffRequest, _chain: &Chain) -> Result<Descriptor> {
    Err(Error::internal("machines are not served yet"))
}
