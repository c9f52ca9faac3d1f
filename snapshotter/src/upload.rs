//! Writing a blob into containerd's content store: a blocking writer feeds the stream of the Content API's `Write`.

use std::collections::HashMap;
use std::io::{self, Write};

use ovms_artifact::digest::Digest;
use prost::bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::error::{Context, Error, Result};
use ovms_containerd::proto::content::content_client::ContentClient;
use ovms_containerd::proto::content::{AbortRequest, Info, UpdateRequest, WriteAction, WriteContentRequest};
use ovms_containerd::Scope;

/// Bytes in one message.
const CHUNK: usize = 1 << 20;
/// Messages that may wait for the network.
const QUEUE: usize = 4;

/// The writing end, for a thread that may block.
#[derive(Debug)]
pub struct BlobWriter {
    to: mpsc::Sender<WriteContentRequest>,
    reference: String,
    offset: i64,
    chunk: Vec<u8>,
}

/// The other end: commits what was written.
#[derive(Debug)]
pub struct Upload {
    to: mpsc::Sender<WriteContentRequest>,
    client: ContentClient<Channel>,
    scope: Scope,
    reference: String,
    answers: JoinHandle<Result<(), Status>>,
}

/// Begins a blob under `reference`; what an earlier attempt left there is given up.
pub async fn begin(mut client: ContentClient<Channel>, scope: &Scope, reference: &str) -> (BlobWriter, Upload) {
    let _nothing_there = client.abort(scope.request(AbortRequest { r#ref: reference.into() })).await;
    let (to, from) = mpsc::channel(QUEUE);
    let request = scope.request(ReceiverStream::new(from));
    let mut writing = client.clone();
    let answers = tokio::spawn(async move {
        let mut answers = writing.write(request).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    });
    let writer = BlobWriter { to: to.clone(), reference: reference.into(), offset: 0, chunk: Vec::new() };
    (writer, Upload { to, client, scope: scope.clone(), reference: reference.into(), answers })
}

impl Upload {
    /// Commits the blob, which has this digest and size, with these labels. One that is there already is fine.
    pub async fn commit(self, digest: Digest, size: u64, labels: HashMap<String, String>) -> Result<()> {
        let Upload { to, mut client, scope, reference, answers } = self;
        let size = i64::try_from(size).context(|| "the blob is too large")?;
        let commit = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: reference,
            total: size,
            expected: digest.to_string(),
            offset: size,
            data: Bytes::new(),
            labels: labels.clone(),
        };
        // A receiver that is gone has left its reason in the answers.
        let _receiver_gone = to.send(commit).await;
        drop(to);
        let refused = || format!("containerd does not take blob {digest}");
        match answers.await.context(refused)? {
            Err(status) if status.code() == Code::AlreadyExists => {}
            answered => return Ok(answered.map_err(|status| ovms_containerd::Error::answer(refused(), status))?),
        }
        let paths = labels.keys().map(|label| format!("labels.{label}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Info::default() };
        let update_mask = Some(prost_types::FieldMask { paths });
        let update = scope.request(UpdateRequest { info: Some(info), update_mask });
        client.update(update).await.map_err(|status| ovms_containerd::Error::answer(refused(), status))?;
        Ok(())
    }

    /// Gives the blob up; returns containerd's own error if that is why.
    pub async fn abort(self) -> Option<Error> {
        let Upload { to, mut client, scope, reference, answers } = self;
        drop(to);
        let ended = answers.await;
        let _nothing_there = client.abort(scope.request(AbortRequest { r#ref: reference })).await;
        match ended {
            Ok(Err(status)) => Some(ovms_containerd::Error::answer("containerd does not take the blob", status).into()),
            _ => None,
        }
    }
}

impl BlobWriter {
    fn send(&mut self) -> io::Result<()> {
        let data = Bytes::from(std::mem::take(&mut self.chunk));
        let len = i64::try_from(data.len()).unwrap_or(i64::MAX);
        let request = WriteContentRequest {
            action: WriteAction::Write.into(),
            r#ref: self.reference.clone(),
            offset: self.offset,
            data,
            ..WriteContentRequest::default()
        };
        self.to.blocking_send(request).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        self.offset = self.offset.saturating_add(len);
        Ok(())
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.get(..CHUNK.saturating_sub(self.chunk.len())).unwrap_or(bytes);
        self.chunk.extend_from_slice(taken);
        if self.chunk.len() == CHUNK {
            self.send()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        self.send()
    }
}
