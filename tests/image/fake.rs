//! A domain and a libxl in this process.
//!
//! The fake libxl is the two pipes: what is written to it is decoded, judged and answered at once. The image goes to a
//! [`Tape`], which both layers write to and read from, as the helper and libxl share one descriptor.

use bytes::BytesMut;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use xen_colo::image::helper::{Message, RestoreJob, SaveJob, StreamType};
use xen_colo::image::{HvmParam, Msr, PageType, TscInfo};
use xen_colo::page::PAGE_SIZE;
use xen_colo::save_helper::Calls;
use xen_colo::save_helper::guest::{CpuPolicy, GuestError, Source, Target};

/// What libxl does when it is asked.
pub type Answer = Box<dyn FnMut(&Message) -> i32>;

/// Both pipes to libxl.
#[derive(Clone)]
pub struct Libxl(Rc<RefCell<State>>);

struct State {
    input: BytesMut,
    replies: Vec<u8>,
    heard: Vec<Message>,
    answer: Answer,
}

impl Libxl {
    pub fn new(answer: impl FnMut(&Message) -> i32 + 'static) -> Self {
        let answer = Box::new(answer);
        Self(Rc::new(RefCell::new(State { input: BytesMut::new(), replies: Vec::new(), heard: Vec::new(), answer })))
    }

    pub fn calls(&self, cbflags: u32) -> Calls<Self, Self> {
        Calls::new(self.clone(), self.clone(), cbflags)
    }

    /// What was said, without log lines and progress.
    pub fn heard(&self) -> Vec<Message> {
        let heard = &self.0.borrow().heard;
        heard.iter().filter(|message| message.number() > 2).cloned().collect()
    }

    /// The log.
    pub fn log(&self) -> String {
        let heard = &self.0.borrow().heard;
        let lines =
            heard.iter().filter_map(|message| if let Message::Log { text, .. } = message { Some(text) } else { None });
        lines.cloned().collect::<Vec<_>>().join("\n")
    }
}

impl Write for Libxl {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.borrow_mut();
        state.input.extend_from_slice(bytes);
        while let Some(message) = Message::decode(&mut state.input).unwrap() {
            if message.has_reply() {
                let reply = (state.answer)(&message);
                state.replies.extend_from_slice(&reply.to_ne_bytes());
            }
            state.heard.push(message);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Libxl {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let replies = &mut self.0.borrow_mut().replies;
        let bytes = replies.len().min(into.len());
        into[..bytes].copy_from_slice(&replies[..bytes]);
        replies.drain(..bytes);
        Ok(bytes)
    }
}

/// The descriptor that two layers share.
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<(Vec<u8>, usize)>>);

impl Tape {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Arc::new(Mutex::new((bytes.to_vec(), 0))))
    }

    pub fn all(&self) -> Vec<u8> {
        self.0.lock().unwrap().0.clone()
    }

    pub fn at(&self) -> usize {
        self.0.lock().unwrap().1
    }

    pub fn put(&self, bytes: &[u8]) {
        self.0.lock().unwrap().0.extend_from_slice(bytes);
    }
}

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Short, as a pipe's writes are.
        let bytes = &bytes[..bytes.len().min(50_000)];
        self.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Tape {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (bytes, at) = &mut *self.0.lock().unwrap();
        let n = (bytes.len() - *at).min(into.len()).min(70_000);
        into[..n].copy_from_slice(&bytes[*at..*at + n]);
        *at += n;
        Ok(n)
    }
}

pub type Memory = BTreeMap<u64, Vec<u8>>;

/// A page that says which it is, and when it was written.
pub fn page(pfn: u64, when: u64) -> Vec<u8> {
    [pfn, when].map(u64::to_le_bytes).concat().repeat(PAGE_SIZE / 16)
}

/// A domain; its own program is a list of what it writes between two looks at the log.
#[derive(Default)]
pub struct Domain {
    pub memory: Memory,
    pub nr_gpfns: u64,
    pub suspended: Arc<Mutex<bool>>,
    pub log_on: bool,
    /// Somebody else has the log on.
    pub log_taken: bool,
    pub log_switched: Vec<bool>,
    pub dirty: BTreeSet<u64>,
    /// One entry a look at the log: what was written before it; `None` gives the page back.
    pub program: std::collections::VecDeque<Vec<(u64, Option<u64>)>>,
    /// Pages that cannot be read once.
    pub flaky: BTreeSet<u64>,
    pub policy: CpuPolicy,
    pub context: Vec<u8>,
    pub params: Vec<HvmParam>,
    pub tsc: TscInfo,
    /// What was done to it, where that matters.
    pub done: Vec<String>,
}

fn no(what: &str) -> GuestError {
    GuestError { what: what.into(), errno: 22 }
}

impl Domain {
    /// `pages` pages, a hole above them, and the special pages far up.
    pub fn new(pages: u64) -> Self {
        let nr_gpfns = 1 << 17;
        let pfns = (0..pages).chain([nr_gpfns - 4, nr_gpfns - 1]);
        Self {
            memory: pfns.map(|pfn| (pfn, if pfn % 3 == 0 { vec![0; PAGE_SIZE] } else { page(pfn, 0) })).collect(),
            nr_gpfns,
            policy: CpuPolicy {
                leaves: vec![[1, 0, 2, 3, 4, 5], [7, 0, 9, 9, 9, 9]],
                msrs: vec![Msr { index: 0x10a, flags: 0, value: 5 }],
            },
            context: b"cpu state".to_vec(),
            params: vec![
                HvmParam { index: 1, value: nr_gpfns - 4 },
                HvmParam { index: 17, value: nr_gpfns - 1 },
                HvmParam { index: 12, value: 3 },
            ],
            tsc: TscInfo { mode: 1, khz: 2_000_000, nsec: 77, incarnation: 3 },
            ..Self::default()
        }
    }

    /// What a restored copy of it must be: its rings are empty.
    pub fn restored(&self) -> Memory {
        let mut memory = self.memory.clone();
        for ring in self.params.iter().filter(|param| param.index != 12) {
            memory.insert(ring.value, vec![0; PAGE_SIZE]);
        }
        memory
    }
}

impl Source for Domain {
    fn xen_version(&self) -> (u32, u32) {
        (4, 17)
    }

    fn nr_gpfns(&self) -> Result<u64, GuestError> {
        Ok(self.nr_gpfns)
    }

    fn total_pages(&self) -> Result<u64, GuestError> {
        Ok(self.memory.len() as u64)
    }

    fn is_suspended(&self) -> Result<bool, GuestError> {
        Ok(*self.suspended.lock().unwrap())
    }

    fn cpu_policy(&self) -> Result<CpuPolicy, GuestError> {
        Ok(self.policy.clone())
    }

    fn page_types(&self, gfns: &[u64], into: &mut Vec<PageType>) -> Result<(), GuestError> {
        assert!(gfns.len() <= 1024, "Xen says E2BIG");
        let kind = |gfn| if self.memory.contains_key(gfn) { PageType::NOTAB } else { PageType::XTAB };
        into.extend(gfns.iter().map(kind));
        Ok(())
    }

    fn read(&mut self, gfns: &[u64], into: &mut Vec<u8>, holes: &mut Vec<usize>) -> Result<(), GuestError> {
        for (at, gfn) in gfns.iter().enumerate() {
            match self.memory.get(gfn).filter(|_| !self.flaky.remove(gfn)) {
                Some(page) => into.extend_from_slice(page),
                None => {
                    into.extend_from_slice(&[0; PAGE_SIZE]);
                    holes.push(at);
                }
            }
        }
        Ok(())
    }

    fn log_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        self.log_on = on;
        self.log_switched.push(on);
        Ok(())
    }

    fn log_dirty_if_free(&mut self) -> Result<bool, GuestError> {
        if !self.log_taken {
            self.log_dirty(true)?;
        }
        Ok(!self.log_taken)
    }

    fn take_dirty(&mut self, into: &mut [u64]) -> Result<(), GuestError> {
        if !self.log_on {
            return Err(no("the log is off"));
        }
        for (pfn, when) in self.program.pop_front().unwrap_or_default() {
            self.nr_gpfns = self.nr_gpfns.max(pfn + 1);
            self.dirty.insert(pfn);
            match when {
                Some(when) => drop(self.memory.insert(pfn, page(pfn, when))),
                None => drop(self.memory.remove(&pfn)),
            }
        }
        for pfn in std::mem::take(&mut self.dirty) {
            match into.get_mut((pfn / 64) as usize) {
                Some(word) => *word |= 1 << (pfn % 64),
                // The guest grew after it was asked how large it is: it is in the next look.
                None => drop(self.dirty.insert(pfn)),
            }
        }
        Ok(())
    }

    fn tsc(&self) -> Result<TscInfo, GuestError> {
        Ok(self.tsc)
    }

    fn hvm_context(&self) -> Result<Vec<u8>, GuestError> {
        Ok(self.context.clone())
    }

    fn hvm_params(&self) -> Result<Vec<HvmParam>, GuestError> {
        Ok(self.params.clone())
    }
}

impl Target for Domain {
    fn populate(&mut self, gfns: &[u64]) -> Result<(), GuestError> {
        for gfn in gfns {
            // What is in a fresh page is nobody's promise.
            if self.memory.insert(*gfn, vec![0xc2; PAGE_SIZE]).is_some() {
                return Err(no("populated twice"));
            }
        }
        Ok(())
    }

    fn write(&mut self, gfns: &[u64], bytes: &[u8]) -> Result<(), GuestError> {
        assert_eq!(gfns.len() * PAGE_SIZE, bytes.len());
        for (gfn, page) in gfns.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
            self.memory.get_mut(gfn).ok_or(no("no page there"))?.copy_from_slice(page);
        }
        Ok(())
    }

    fn read(&mut self, gfns: &[u64], into: &mut Vec<u8>) -> Result<(), GuestError> {
        for gfn in gfns {
            into.extend_from_slice(self.memory.get(gfn).ok_or(no("no page there"))?);
        }
        Ok(())
    }

    fn clear_page(&mut self, gfn: u64) -> Result<(), GuestError> {
        self.memory.get_mut(&gfn).ok_or(no("no page there"))?.fill(0);
        Ok(())
    }

    fn set_cpu_policy(&mut self, policy: &CpuPolicy) -> Result<(), GuestError> {
        self.done.push("policy".into());
        self.policy = policy.clone();
        Ok(())
    }

    fn set_tsc(&mut self, tsc: &TscInfo) -> Result<(), GuestError> {
        self.done.push("tsc".into());
        self.tsc = *tsc;
        Ok(())
    }

    fn set_hvm_param(&mut self, index: u32, value: u64) -> Result<(), GuestError> {
        self.done.push(format!("param {index} = {value}"));
        Ok(())
    }

    fn load_hvm_context(&mut self, context: &[u8]) -> Result<(), GuestError> {
        self.done.push("context".into());
        self.context = context.to_vec();
        Ok(())
    }

    fn seed_grants(&mut self, console: (u64, u16), store: (u64, u16)) -> Result<(), GuestError> {
        self.done.push(format!("grants {console:?} {store:?}"));
        Ok(())
    }
}

/// What libxl asks for when it saves.
pub fn save_job(stream: StreamType, live: bool) -> SaveJob {
    SaveJob { stream_fd: 3, domid: 5, live, debug: false, cbflags: 0xf8, stream }
}

/// What libxl asks for when it restores.
pub fn restore_job(stream: StreamType) -> RestoreJob {
    RestoreJob {
        stream_fd: 3,
        domid: 6,
        store_port: 1,
        store_domid: 0,
        console_port: 2,
        console_domid: 0,
        cbflags: 0x120,
        stream,
    }
}
