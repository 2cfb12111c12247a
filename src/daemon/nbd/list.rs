//! `xl-colo nbd --list`: what a server offers, as `qemu-nbd --list` tells it.
//!
//! ```text
//!   greeting ─▶ flags ─▶ STRUCTURED_REPLY ─▶ LIST ─▶ of each export: INFO, LIST_META_CONTEXT ─▶ ABORT
//! ```
//!
//! A server that cannot do one of these is believed: then less is told. Source: `doc/proto.md`; qemu `qemu-nbd.c`.

use super::export::Where;
use super::threads::{Stream, Timed};
use crate::nbd::{
    EXPORT_CAN_MULTI_CONN, EXPORT_READ_ONLY, EXPORT_SEND_CACHE, EXPORT_SEND_DF, EXPORT_SEND_FAST_ZERO,
    EXPORT_SEND_FLUSH, EXPORT_SEND_FUA, EXPORT_SEND_TRIM, EXPORT_SEND_WRITE_ZEROES, FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, MAX_STRING_BYTES, OPT_ABORT, OPT_INFO, OPT_LIST,
    OPT_LIST_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR_BIT, REP_INFO,
    REP_META_CONTEXT, REP_SERVER, SERVER_MAGIC,
};
use bytes::{Buf, BufMut};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a server may take in all.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest reply that is taken: a name and a description.
const REPLY_MAX_BYTES: usize = 4 + 2 * MAX_STRING_BYTES;
/// All that is taken.
const ANSWERS_MAX_BYTES: usize = 4 << 20;
/// How many these are at most, and so exports.
const REPLIES_MAX: usize = 10_000;
/// QEMU's names of the flags, in its order.
const FLAGS: [(u16, &str); 10] = [
    (EXPORT_READ_ONLY, "readonly"),
    (EXPORT_SEND_FLUSH, "flush"),
    (EXPORT_SEND_FUA, "fua"),
    (1 << 4, "rotational"),
    (EXPORT_SEND_TRIM, "trim"),
    (EXPORT_SEND_WRITE_ZEROES, "zeroes"),
    (EXPORT_SEND_DF, "df"),
    (EXPORT_CAN_MULTI_CONN, "multi"),
    (EXPORT_SEND_CACHE, "cache"),
    (EXPORT_SEND_FAST_ZERO, "fast-zero"),
];

/// Why a server's exports are not known.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The connection.
    #[error("the server's exports: {0}")]
    Link(#[from] io::Error),
    /// It does not speak as a server does that can be asked.
    #[error("this is no server that can list its exports: {0}")]
    Server(String),
    /// It will not.
    #[error("the server does not list its exports: {0}")]
    Refused(String),
}

struct Asking<L> {
    link: L,
    /// Of all replies so far.
    all_bytes: usize,
}

/// A reply that is no error: what kind, and what is in it.
type Answer = (u32, Vec<u8>);

impl<L: Read + Write> Asking<L> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.link.read_exact(&mut bytes).map(|()| bytes)
    }

    fn greet(&mut self) -> Result<(), ListError> {
        let mut greeting = &self.take::<18>()?[..];
        if (greeting.get_u64(), greeting.get_u64()) != (SERVER_MAGIC, OPTION_MAGIC) {
            return Err(ListError::Server("it is no NBD server of the newstyle".into()));
        }
        let flags = greeting.get_u16();
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(ListError::Server("it is not fixed newstyle".into()));
        }
        Ok(self.link.write_all(&u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).to_be_bytes())?)
    }

    fn say(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(16 + data.len());
        bytes.put_u64(OPTION_MAGIC);
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        self.link.write_all(&bytes)
    }

    /// Everything that is answered, or the words of the refusal.
    fn ask(&mut self, option: u32, data: &[u8]) -> Result<Result<Vec<Answer>, String>, ListError> {
        self.say(option, data)?;
        let mut answers = Vec::new();
        while answers.len() < REPLIES_MAX {
            let mut header = &self.take::<20>()?[..];
            let (magic, of, kind) = (header.get_u64(), header.get_u32(), header.get_u32());
            let len = header.get_u32() as usize;
            if magic != OPTION_REPLY_MAGIC || of != option || len > REPLY_MAX_BYTES {
                return Err(ListError::Server(format!("its reply to option {option} is none")));
            }
            self.all_bytes += len;
            if self.all_bytes > ANSWERS_MAX_BYTES {
                return Err(ListError::Server(format!("it says more than {ANSWERS_MAX_BYTES} bytes")));
            }
            let mut data = vec![0; len];
            self.link.read_exact(&mut data)?;
            match kind {
                REP_ACK => return Ok(Ok(answers)),
                kind if kind & REP_ERROR_BIT != 0 => {
                    let why = shown(&data);
                    return Ok(Err(if why.is_empty() { format!("error {}", kind & !REP_ERROR_BIT) } else { why }));
                }
                kind => answers.push((kind, data)),
            }
        }
        Err(ListError::Server(format!("more than {REPLIES_MAX} replies")))
    }
}

/// The same of the server that listens there.
pub fn list_at(at: &Where) -> Result<String, ListError> {
    let stream = match at {
        Where::Unix(path) => Stream::Unix(UnixStream::connect(path)?.into()),
        Where::Tcp(address, port) => Stream::Tcp(TcpStream::connect((address.as_str(), *port))?.into()),
    };
    list(Timed { stream, until: Some(Instant::now() + PATIENCE) })
}

/// What a server has chosen, for a terminal: nothing in it is an order to that.
fn shown(text: &[u8]) -> String {
    String::from_utf8_lossy(text).replace(char::is_control, "?")
}

/// What a server tells of its exports, in qemu-nbd's lines.
pub fn list(link: impl Read + Write) -> Result<String, ListError> {
    let mut asking = Asking { link, all_bytes: 0 };
    asking.greet()?;
    let is_structured = asking.ask(OPT_STRUCTURED_REPLY, &[])?.is_ok();
    let servers = asking.ask(OPT_LIST, &[])?.map_err(ListError::Refused)?;
    let servers: Vec<_> = servers.into_iter().filter(|(kind, _)| *kind == REP_SERVER).collect();
    let mut lines = vec![format!("exports available: {}", servers.len())];
    for (_, entry) in &servers {
        let mut entry = &entry[..];
        let len = entry.try_get_u32().unwrap_or(u32::MAX) as usize;
        let (name, description) =
            entry.split_at_checked(len).ok_or_else(|| ListError::Server("a name in its list is cut off".into()))?;
        lines.push(format!(" export: '{}'", shown(name)));
        let mut request = Vec::new();
        request.put_u32(name.len() as u32);
        request.put_slice(name);
        let mut wanted = request.clone();
        wanted.put_slice(&[0, 2]);
        wanted.put_u16(INFO_BLOCK_SIZE);
        wanted.put_u16(INFO_DESCRIPTION);
        match asking.ask(OPT_INFO, &wanted)? {
            Ok(infos) => lines.extend(described(description, &infos)),
            Err(why) => lines.push(format!("  {why}")),
        }
        if is_structured {
            request.put_u32(0);
            if let Ok(contexts) = asking.ask(OPT_LIST_META_CONTEXT, &request)? {
                let contexts: Vec<_> = contexts.iter().filter(|(kind, _)| *kind == REP_META_CONTEXT).collect();
                if !contexts.is_empty() {
                    lines.push(format!("  available meta contexts: {}", contexts.len()));
                }
                let name = |name: &[u8]| format!("   {}", shown(name));
                lines.extend(contexts.iter().filter_map(|(_, context)| context.get(4..).map(name)));
            }
        }
    }
    // It may have hung up.
    let _ = asking.say(OPT_ABORT, &[]);
    Ok(lines.join("\n"))
}

fn described(listed: &[u8], infos: &[Answer]) -> Vec<String> {
    let mut lines = Vec::new();
    let of = |wanted: u16| {
        infos.iter().filter(|(kind, _)| *kind == REP_INFO).find_map(|(_, info)| {
            let mut info = &info[..];
            (info.try_get_u16() == Ok(wanted)).then_some(info)
        })
    };
    let text = of(INFO_DESCRIPTION).unwrap_or(listed);
    if !text.is_empty() {
        lines.push(format!("  description: {}", shown(text)));
    }
    if let Some(mut export) = of(INFO_EXPORT)
        && let (Ok(size_bytes), Ok(flags)) = (export.try_get_u64(), export.try_get_u16())
    {
        let names = FLAGS.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name);
        let names = names.collect::<Vec<_>>().join(" ");
        lines.extend([format!("  size:  {size_bytes}"), format!("  flags: {flags:#x} ( {names} )")]);
    }
    if let Some(mut sizes) = of(INFO_BLOCK_SIZE) {
        let names = ["min block", "opt block", "max block"];
        lines
            .extend(names.iter().filter_map(|name| sizes.try_get_u32().ok().map(|bytes| format!("  {name}: {bytes}"))));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::{Encryption, Export, Handshake};
    use bytes::BytesMut;

    /// A server at the other end of a call.
    struct Server {
        handshake: Handshake,
        input: BytesMut,
        said: Vec<u8>,
    }

    impl Server {
        fn of(exports: Vec<Export>) -> Self {
            Self::with(Handshake::new(exports))
        }

        fn with(mut handshake: Handshake) -> Self {
            let said = handshake.poll_output().unwrap().to_vec();
            Self { handshake, input: BytesMut::new(), said }
        }
    }

    impl Read for Server {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            // In pieces, as a socket may.
            let len = into.len().min(self.said.len()).min(7);
            into[..len].copy_from_slice(&self.said[..len]);
            self.said.drain(..len);
            Ok(len)
        }
    }

    impl Write for Server {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.input.extend_from_slice(bytes);
            let _ = self.handshake.handle_input(&mut self.input);
            self.said.extend(self.handshake.poll_output().unwrap_or_default());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn two_exports_are_told_in_qemus_lines() {
        let mut root = Export::new("root", 1024);
        (root.description, root.fast_zero, root.tells_depth) = ("bar baz".into(), true, true);
        let mut iso = Export::new("iso", 4096);
        (iso.read_only, iso.multi_conn) = (true, true);
        let told = list(Server::of(vec![root, iso])).unwrap();
        let expected = "exports available: 2
 export: 'root'
  description: bar baz
  size:  1024
  flags: 0xced ( flush fua trim zeroes df cache fast-zero )
  min block: 1
  opt block: 4096
  max block: 33554432
  available meta contexts: 2
   base:allocation
   qemu:allocation-depth
 export: 'iso'
  size:  4096
  flags: 0x587 ( readonly flush df multi cache )
  min block: 1
  opt block: 4096
  max block: 33554432
  available meta contexts: 1
   base:allocation";
        assert_eq!(told, expected);
        assert_eq!(list(Server::of(Vec::new())).unwrap(), "exports available: 0");
    }

    #[test]
    fn what_is_no_such_server_is_told_apart() {
        let after = |said: &[u8]| {
            let mut server = Server::of(Vec::new());
            server.said = said.to_vec();
            list(server).unwrap_err().to_string()
        };
        assert!(after(b"NBDMAGIC").contains("failed to fill"), "cut off");
        assert!(after(b"SSH-2.0-OpenSSH_9.2p1").contains("no NBD server"));
        assert!(after(b"NBDMAGICIHAVEOPT\0\0").contains("not fixed newstyle"));
        let reply = |option: u32, kind: u32, len: u32, data: &[u8]| {
            let numbers = [option, kind, len].map(u32::to_be_bytes).concat();
            [&b"NBDMAGICIHAVEOPT\0\x01"[..], &OPTION_REPLY_MAGIC.to_be_bytes(), &numbers, data].concat()
        };
        assert!(after(&reply(7, REP_ACK, 0, b"")).contains("reply to option 8"), "of something else");
        assert!(after(&reply(8, 1, u32::MAX, b"")).contains("reply to option 8"), "longer than any");
    }

    #[test]
    fn a_server_that_will_not_is_quoted() {
        let handshake = Handshake::new(Vec::new()).with_encryption(Encryption::Required);
        let refused = list(Server::with(handshake)).unwrap_err().to_string();
        assert_eq!(refused, "the server does not list its exports: Option 0x3 not permitted before TLS");
    }
}
