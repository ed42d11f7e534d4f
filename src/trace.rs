//! A timeline of a create, of the parent's and the child's side: marks in a memory file that both append to.

use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Whose mark it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// The runtime.
    Parent,
    /// The container's init.
    Child,
}

/// A timeline. Clones write to the same one.
#[derive(Clone, Debug)]
pub struct Trace(Rc<std::fs::File>);

/// The mark that ends the last step of a side.
const END: &str = "end";

impl AsRawFd for Trace {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Trace {
    /// An empty one.
    pub fn new() -> Result<Trace> {
        let fail = |errno| Error::sys("make a trace", errno);
        let fd = memfd_create(c"trace", MFdFlags::MFD_CLOEXEC).map_err(fail)?;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_APPEND)).map_err(fail)?;
        Ok(Trace(Rc::new(fd.into())))
    }

    /// A step begins, and the one before it ends.
    pub fn mark(&self, side: Track, step: &str) {
        // Not the monotonic clock: a time namespace moves it.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let side = if side == Track::Parent { 'P' } else { 'C' };
        let _ = (&*self.0).write_all(format!("{side} {now} {step}\n").as_bytes());
    }

    /// The last step of a side ends.
    pub fn end(&self, side: Track) {
        self.mark(side, END);
    }

    /// The steps that have ended, by their beginning.
    pub fn steps(&self) -> Result<Vec<Step>> {
        let mut text = String::new();
        let mut file = &*self.0;
        file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(|e| Error::io("read the trace", &e))?;
        Ok(steps(&text))
    }

    /// The timeline in the trace event format that browsers' trace viewers open; times in microseconds.
    pub fn events(&self) -> Result<Value> {
        self.steps().map(|steps| events(&steps))
    }
}

/// A step of a timeline. Times in nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Who took it.
    pub side: Track,
    /// What was done.
    pub name: String,
    /// When it began.
    pub begin: u64,
    /// When it ended.
    pub end: u64,
}

fn steps(text: &str) -> Vec<Step> {
    let mut out = Vec::new();
    for (side, letter) in [(Track::Parent, "P "), (Track::Child, "C ")] {
        let mark = |line: &'_ str| -> Option<(u64, String)> {
            let (time, name) = line.strip_prefix(letter)?.split_once(' ')?;
            Some((time.parse().ok()?, name.to_string()))
        };
        let marks: Vec<_> = text.lines().filter_map(mark).collect();
        for pair in marks.windows(2).filter(|pair| pair[0].1 != END) {
            out.push(Step { side, name: pair[0].1.clone(), begin: pair[0].0, end: pair[1].0 });
        }
    }
    out.sort_by_key(|step| step.begin);
    out
}

fn events(steps: &[Step]) -> Value {
    let start = steps.iter().map(|step| step.begin).min().unwrap_or(0);
    let mut out = Vec::new();
    for (thread, side, name) in [(1, Track::Parent, "runtime"), (2, Track::Child, "container init")] {
        if steps.iter().any(|step| step.side == side) {
            out.push(json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}));
        }
        for step in steps.iter().filter(|step| step.side == side) {
            let micros = |nanos: u64| nanos.saturating_sub(start) as f64 / 1000.0;
            let (begin, end) = (micros(step.begin), micros(step.end));
            out.push(json!({"name": step.name, "ph": "X", "pid": 1, "tid": thread, "ts": begin, "dur": end - begin}));
        }
    }
    json!({"traceEvents": out, "displayTimeUnit": "ms"})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_become_events_of_two_sides() {
        let events = events(&steps("P 1000 plan\nP 3000 clone\nC 3500 mounts\nP 4000 end\nC 5500 end\n"));
        let list = events["traceEvents"].as_array().unwrap();
        let of = |name: &str| list.iter().find(|event| event["name"] == name).unwrap();
        assert_eq!((&of("clone")["ts"], &of("clone")["dur"]), (&json!(2.0), &json!(1.0)));
        assert_eq!((&of("mounts")["tid"], &of("mounts")["dur"]), (&json!(2), &json!(2.0)));
        assert!(list.iter().all(|event| event["name"] != "end"));
    }
}
