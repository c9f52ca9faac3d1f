//! The way to containerd: its content, containers, images and leases services.
//!
//! Blobs are read and written through the Content API, never by path: the store may be another plugin's. Every call
//! names the namespace; a lease that came with a request goes along with what the request makes, or garbage collection
//! would take it at once.
#![forbid(unsafe_code)]

mod error;
pub mod proto;

use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use prost::bytes::{Buf, Bytes};
use time::format_description::well_known::Rfc3339;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::proto::containers::containers_client::ContainersClient;
use crate::proto::containers::{Container, GetContainerRequest};
use crate::proto::content::content_client::ContentClient;
use crate::proto::content::{InfoRequest, ReadContentRequest};
use crate::proto::images::images_client::ImagesClient;
use crate::proto::images::{GetImageRequest, Image};
use crate::proto::leases::leases_client::LeasesClient;
use crate::proto::leases::CreateRequest;

pub use error::{Error, Kind, Result};

/// gRPC metadata that carries the namespace.
const NAMESPACE: &str = "containerd-namespace";
/// gRPC metadata that carries the lease.
const LEASE: &str = "containerd-lease";
/// Label of a lease: when it ends, in RFC 3339 (containerd's docs/garbage-collection.md).
const EXPIRE: &str = "containerd.io/gc.expire";
/// How long a client has to refer to what was made for it.
const LEASE_TIME: Duration = Duration::from_secs(3600);
/// The longest message that containerd sends or takes, in bytes.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Messages that may wait between the network and the thread that reads them.
const QUEUE: usize = 4;

/// Whose behalf a call to containerd is on.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    namespace: Option<MetadataValue<Ascii>>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Scope {
    /// What a request to us says.
    #[must_use]
    pub fn of(metadata: &MetadataMap) -> Self {
        Self { namespace: metadata.get(NAMESPACE).cloned(), lease: metadata.get(LEASE).cloned() }
    }

    /// A namespace by name.
    ///
    /// # Errors
    /// [`Kind::Invalid`].
    pub fn namespace(name: &str) -> Result<Self> {
        let bad = |err| Error::new(Kind::Invalid, format!("{name:?} is no namespace")).because(err);
        let namespace = name.parse().map_err(bad)?;
        Ok(Self { namespace: Some(namespace), lease: None })
    }

    /// A request on this behalf.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        for (key, value) in [(NAMESPACE, &self.namespace), (LEASE, &self.lease)] {
            if let Some(value) = value {
                request.metadata_mut().insert(key, value.clone());
            }
        }
        request
    }
}

/// containerd's API; connections are made when they are first used and again after containerd has restarted.
#[derive(Clone, Debug)]
pub struct Containerd {
    channel: Channel,
}

impl Containerd {
    /// A client of the socket at `path`.
    ///
    /// # Errors
    /// [`Kind::Invalid`].
    pub fn new(path: &Path) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", path.display()))
            .map_err(|err| Error::new(Kind::Invalid, format!("{} is no socket's path", path.display())).because(err))?
            .connect_timeout(Duration::from_secs(10));
        Ok(Self { channel: endpoint.connect_lazy() })
    }

    /// The content service.
    pub fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// The size of a blob in bytes.
    ///
    /// # Errors
    /// Every [`Kind`].
    pub async fn blob_size(&self, scope: &Scope, digest: &str) -> Result<u64> {
        let request = scope.request(InfoRequest { digest: digest.into() });
        let answer = self.content().info(request).await.map_err(|status| blob_error(digest, status))?;
        let size = answer.into_inner().info.map(|info| info.size);
        size.and_then(|size| u64::try_from(size).ok())
            .ok_or_else(|| Error::new(Kind::Internal, format!("containerd does not say the size of blob {digest}")))
    }

    /// Opens a blob for a blocking reader. The reader's stream ends early once the transfer is dropped: whoever is
    /// cancelled while a thread still reads stops that thread by it.
    ///
    /// # Errors
    /// Every [`Kind`].
    pub async fn read_blob(&self, scope: &Scope, digest: &str) -> Result<(BlobReader, Transfer)> {
        let request = scope.request(ReadContentRequest { digest: digest.into(), offset: 0, size: 0 });
        let answer = self.content().read(request).await.map_err(|status| blob_error(digest, status))?;
        let mut stream = answer.into_inner();
        let (to, from) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            loop {
                let message = match stream.message().await {
                    Ok(Some(message)) => Ok(message.data),
                    Ok(None) => return,
                    Err(status) => Err(status),
                };
                let last = message.is_err();
                if to.send(message).await.is_err() || last {
                    return;
                }
            }
        });
        Ok((BlobReader { from, data: Bytes::new() }, Transfer(task.abort_handle())))
    }

    /// Reads a small blob whole.
    ///
    /// # Errors
    /// Every [`Kind`]; [`Kind::Invalid`] for a blob that is larger than `most` bytes.
    pub async fn read_small(&self, scope: &Scope, digest: &str, most: u64) -> Result<Vec<u8>> {
        let size = self.blob_size(scope, digest).await?;
        if size > most {
            return Err(Error::new(
                Kind::Invalid,
                format!("blob {digest} has {size} bytes where at most {most} make sense"),
            ));
        }
        let (reader, _transfer) = self.read_blob(scope, digest).await?;
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            reader.take(most.saturating_add(1)).read_to_end(&mut bytes).map(|_| bytes)
        });
        let failed = |what: String| {
            move |err: Box<dyn std::error::Error + Send + Sync>| Error::new(Kind::Internal, what).because(err)
        };
        let bytes = read.await.map_err(|err| failed("a worker thread failed".into())(err.into()))?;
        bytes.map_err(|err| failed(format!("cannot read blob {digest}"))(err.into()))
    }

    /// The same behalf with a lease. containerd does not hand a client's lease on to proxy plugins, and without one its
    /// garbage collector may take what we make before the client has referred to it; so we take a short one ourselves.
    ///
    /// # Errors
    /// Every [`Kind`].
    pub async fn leased(&self, scope: &Scope) -> Result<Scope> {
        if scope.lease.is_some() {
            return Ok(scope.clone());
        }
        let failed = || Error::new(Kind::Internal, "containerd gives no lease");
        let expire = (OffsetDateTime::now_utc() + LEASE_TIME).format(&Rfc3339);
        let expire = expire.map_err(|err| failed().because(err))?;
        let labels = [(EXPIRE.to_owned(), expire)].into();
        let mut client = LeasesClient::new(self.channel.clone());
        let answer = client.create(scope.request(CreateRequest { id: String::new(), labels })).await;
        let answer = answer.map_err(|status| Error::answer("containerd gives no lease", status))?;
        let id = answer.into_inner().lease.unwrap_or_default().id;
        let bad = |err| Error::new(Kind::Internal, format!("{id:?} is no lease")).because(err);
        let lease = id.parse().map_err(bad)?;
        Ok(Scope { lease: Some(lease), ..scope.clone() })
    }

    /// The record of a container.
    ///
    /// # Errors
    /// Every [`Kind`].
    pub async fn container(&self, scope: &Scope, id: &str) -> Result<Container> {
        let mut client = ContainersClient::new(self.channel.clone());
        let answer = client.get(scope.request(GetContainerRequest { id: id.into() })).await;
        let answer = answer.map_err(|status| Error::answer(format!("container {id} cannot be looked up"), status))?;
        answer
            .into_inner()
            .container
            .ok_or_else(|| Error::new(Kind::NotFound, format!("container {id} does not exist")))
    }

    /// The record of an image.
    ///
    /// # Errors
    /// Every [`Kind`].
    pub async fn image(&self, scope: &Scope, name: &str) -> Result<Image> {
        let mut client = ImagesClient::new(self.channel.clone());
        let answer = client.get(scope.request(GetImageRequest { name: name.into() })).await;
        let answer = answer.map_err(|status| Error::answer(format!("image {name} cannot be looked up"), status))?;
        answer.into_inner().image.ok_or_else(|| Error::new(Kind::NotFound, format!("image {name} does not exist")))
    }
}

fn blob_error(digest: &str, status: Status) -> Error {
    Error::answer(format!("blob {digest} cannot be read from containerd's content store"), status)
}

/// Keeps a blob coming as long as it lives.
#[derive(Debug)]
pub struct Transfer(tokio::task::AbortHandle);

impl Drop for Transfer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A blob on its way from containerd, for a thread that may block.
#[derive(Debug)]
pub struct BlobReader {
    from: mpsc::Receiver<std::result::Result<Bytes, Status>>,
    data: Bytes,
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.data.is_empty() {
            match self.from.blocking_recv() {
                Some(Ok(data)) => self.data = data,
                Some(Err(status)) => return Err(io::Error::other(status)),
                None => return Ok(0),
            }
        }
        let len = buf.len().min(self.data.len());
        self.data.copy_to_slice(&mut buf[..len]);
        Ok(len)
    }
}
