//! Between the asynchronous streams of the client and readers that block.

use std::io::{self, Read};

use futures_util::stream::{self, Stream};
use futures_util::StreamExt;
use oci_client::client::Client;
use oci_client::errors::{DigestError, OciDistributionError};
use oci_client::Reference;
use ovms_artifact::digest::VerifyingReader;
use ovms_artifact::image::Blob;
use ovms_artifact::layout::Source;
use tokio::runtime::Runtime;

/// Bytes that go to the network at once.
const CHUNK: usize = 256 << 10;

/// A blob in a registry, for a sink. Its reader fails at the end unless size and digest are right.
pub(crate) struct RemoteBlob<'a> {
    pub(crate) runtime: &'a Runtime,
    pub(crate) client: &'a Client,
    pub(crate) reference: &'a Reference,
    pub(crate) blob: &'a Blob,
}

impl Source for RemoteBlob<'_> {
    fn name(&self) -> String {
        self.blob.digest.to_string()
    }

    fn size(&self) -> u64 {
        self.blob.size
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        let digest = self.blob.digest.to_string();
        let opened = self.runtime.block_on(self.client.pull_blob_stream(self.reference, digest.as_str()));
        let stream = opened.map_err(io::Error::other)?.stream;
        let reader = StreamReader { runtime: self.runtime, stream, rest: Vec::new(), read: 0 };
        Ok(Box::new(VerifyingReader::new(reader, self.blob.digest, self.blob.size)))
    }
}

/// Drives a stream on the reader's own thread.
struct StreamReader<'a, S, B> {
    runtime: &'a Runtime,
    stream: S,
    rest: Vec<B>,
    /// Bytes of `rest` that were handed on.
    read: usize,
}

impl<S, B> Read for StreamReader<'_, S, B>
where
    S: Stream<Item = io::Result<B>> + Unpin,
    B: AsRef<[u8]>,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(bytes) = self.rest.first() {
                let left = bytes.as_ref().get(self.read..).unwrap_or_default();
                let length = left.len().min(buffer.len());
                if length > 0 || buffer.is_empty() {
                    buffer[..length].copy_from_slice(&left[..length]);
                    self.read += length;
                    return Ok(length);
                }
            }
            self.rest.clear();
            self.read = 0;
            match self.runtime.block_on(self.stream.next()) {
                // The verifying reader around this one compares the same bytes and tells it in our words.
                Some(Err(err)) if err.get_ref().is_some_and(|inner| inner.is::<DigestError>()) => return Ok(0),
                Some(bytes) => self.rest.push(bytes?),
                None => return Ok(0),
            }
        }
    }
}

/// What a reader gives, as the body of a request. Reading blocks the runtime, which has nothing else to do meanwhile.
pub(crate) fn body(
    reader: impl Read + Send + 'static,
    told: impl Fn(u64) + Send + 'static,
) -> impl Stream<Item = Result<Vec<u8>, OciDistributionError>> + Send + 'static {
    stream::try_unfold((reader, told), |(mut reader, told)| async move {
        let mut chunk = Vec::with_capacity(CHUNK);
        reader.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
        told(chunk.len() as u64);
        Ok((!chunk.is_empty()).then_some((chunk, (reader, told))))
    })
}
