//! Our NBD client machine on a socket.

use super::peer::soon;
use super::until;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xen_colo::daemon::address::{Address, Link};
use xen_colo::nbd::client::{Client, Limits};

/// The machine and its socket.
pub struct Conversation {
    /// The machine.
    pub client: Client,
    /// Its socket.
    pub link: Link,
    input: BytesMut,
}

/// What came of a request.
pub type Outcome = Result<Bytes, String>;

impl Conversation {
    /// Connects and negotiates.
    pub async fn open(address: Address, export: &str) -> Self {
        let link = until("the server listens", async || address.connect().await.map_err(|e| e.to_string())).await;
        let client = Client::new(export, Limits::default()).unwrap();
        let mut it = Self { client, link, input: BytesMut::new() };
        while it.client.export().is_none() {
            it.step().await;
        }
        it
    }

    /// Sends what waits, and takes something that arrives.
    pub async fn step(&mut self) {
        while let Some(bytes) = self.client.poll_output() {
            soon("the server reads", self.link.write_all(&bytes)).await.unwrap();
        }
        let read = soon("the server answers", self.link.read_buf(&mut self.input)).await.unwrap();
        assert!(read > 0, "the server hung up");
        self.client.handle_input(&mut self.input).unwrap();
    }

    /// Waits for as many completions, and returns them in the order of their cookies.
    pub async fn completes(&mut self, count: usize) -> Vec<Outcome> {
        let mut done = Vec::new();
        while done.len() < count {
            match self.client.poll_completion() {
                Some(completion) => done.push(completion),
                None => self.step().await,
            }
        }
        done.sort_by_key(|completion| completion.cookie);
        let outcome = |it: xen_colo::nbd::client::Completion| it.result.map(|()| it.data).map_err(|e| format!("{e:?}"));
        done.into_iter().map(outcome).collect()
    }

    /// Writes, and waits for it.
    pub async fn writes(&mut self, offset: u64, data: Vec<u8>) -> Outcome {
        self.client.write(offset, data.into()).unwrap();
        self.completes(1).await.remove(0)
    }

    /// Reads, and waits for it.
    pub async fn reads(&mut self, offset: u64, len_bytes: u32) -> Outcome {
        self.client.read(offset, len_bytes).unwrap();
        self.completes(1).await.remove(0)
    }
}
