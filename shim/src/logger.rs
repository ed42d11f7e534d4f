//! Logger processes: `binary://` and `binary-v2://` URIs (containerd docs/runtime-v2.md, "IO"; cmd/containerd-shim-runc-v2/process/io.go).

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use skiff::launch::chore::{self, Spawning};
use skiff::launch::{Process, hang};
use skiff::sys::process::CStrings;
use skiff::{Error, Kind, Result, limits};
use tokio::io::Interest;

use crate::io::watch_fd;
use crate::process::settle;

/// How long a logger may take to end when its streams have ended, and then when it has been told to.
const PATIENCE: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(12)];

/// A logger that has been started.
pub struct Logger {
    process: Process,
    spawning: Option<Spawning>,
    ready: OwnedFd,
    /// It must say that it is ready; otherwise the end of that pipe is enough.
    must_say: bool,
    uri: String,
}

/// The program and its arguments.
fn command(uri: &str) -> Result<Option<(bool, Vec<String>)>> {
    let (must_say, rest) = match (uri.strip_prefix("binary://"), uri.strip_prefix("binary-v2://")) {
        (Some(rest), _) => (false, rest),
        (_, Some(rest)) => (true, rest),
        _ => return Ok(None),
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut argv = vec![decode(path)];
    if !argv[0].starts_with('/') {
        return Err(Error::invalid("stdout", format!("{uri:?} does not name an absolute path")));
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        argv.push(decode(key));
        if !value.is_empty() {
            argv.push(decode(value));
        }
    }
    Ok(Some((must_say, argv)))
}

/// Percent decoding of a URI; `+` is a blank.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(value)) => {
                out.push(value);
                at += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl Logger {
    /// Starts the logger that `uri` names; None when it names none. The process under it writes to the two descriptors.
    pub fn start(uri: &str, id: &str, namespace: &str) -> Result<Option<(Logger, OwnedFd, OwnedFd)>> {
        let Some((must_say, argv)) = command(uri)? else { return Ok(None) };
        let strings = |list: Vec<String>| -> Result<CStrings> {
            let list =
                list.into_iter().map(|s| CString::new(s).map_err(|_| Error::invalid("stdout", "has a NUL byte")));
            Ok(CStrings::new(list.collect::<Result<_>>()?))
        };
        let argv = strings(argv)?;
        let env = strings(vec![format!("CONTAINER_ID={id}"), format!("CONTAINER_NAMESPACE={namespace}")])?;
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| Error::sys("make a pipe", errno));
        let ((out_read, out), (err_read, err), (ready, say)) = (pipe()?, pipe()?, pipe()?);
        let fds = [out_read, err_read, say];
        let spawned = chore::spawn(&argv.as_slice()[0], &argv, &env, &fds).map_err(|err| err.context("stdout"))?;
        let (process, spawning) = (spawned.0, Some(spawned.1));
        Ok(Some((Logger { process, spawning, ready, must_say, uri: uri.to_string() }, out, err)))
    }

    /// Waits until the logger is ready: it writes a byte or closes the pipe.
    pub async fn ready(&mut self) -> Result<()> {
        let limit = limits::within(limits::LOGGER);
        if let Ok(ready) = tokio::time::timeout(limit, self.says_that_it_is()).await {
            return ready;
        }
        let text = format!("stdout: {:?} is not ready within {} s", self.uri, limit.as_secs());
        let late = hang::late(self.process.pid, &text);
        // It has nothing to write yet.
        let _ = self.process.kill(libc::SIGKILL);
        Err(late)
    }

    async fn says_that_it_is(&mut self) -> Result<()> {
        if let Some(spawning) = self.spawning.take() {
            settle(spawning).await.map_err(|err| err.context("stdout"))?;
        }
        let fail = |errno| Error::sys(format!("stdout: wait for {:?}", self.uri), errno);
        let fd = self.ready.try_clone().map_err(|e| Error::io("watch the logger", &e))?;
        let fd = watch_fd(fd, Interest::READABLE).map_err(fail)?;
        let _ = fd.readable().await.map_err(|e| Error::io("watch the logger", &e))?;
        match nix::unistd::read(fd.get_ref(), &mut [0; 1]).map_err(fail)? {
            0 if self.must_say => {
                let text = format!("stdout: {:?} ended before it was ready", self.uri);
                Err(Error::new(Kind::System, text))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Logger {
    /// Its streams have ended: it may write what it still has, and then it must go.
    fn drop(&mut self) {
        let Ok(pidfd) = self.process.pidfd.try_clone() else { return };
        let process = Process { pid: self.process.pid, pidfd };
        tokio::task::spawn_local(async move {
            let Ok(fd) = process.pidfd.as_fd().try_clone_to_owned() else { return };
            let Ok(exited) = watch_fd(fd, Interest::READABLE) else { return };
            for (patience, signal) in PATIENCE.into_iter().zip([libc::SIGTERM, libc::SIGKILL]) {
                if tokio::time::timeout(patience, exited.readable()).await.is_ok() {
                    break;
                }
                let _ = process.kill(signal);
            }
            let _ = exited.readable().await;
            let _ = process.try_wait();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_a_program_with_pairs_of_arguments() {
        let (must_say, argv) = command("binary:///usr/bin/log%20it?id=a%2Fb&x&y=c+d").unwrap().unwrap();
        assert_eq!(
            (must_say, argv),
            (false, ["/usr/bin/log it", "id", "a/b", "x", "y", "c d"].map(String::from).to_vec())
        );
        assert!(command("binary-v2:///l").unwrap().unwrap().0);
        assert!(command("fifo:///x").unwrap().is_none());
        assert!(command("binary://relative").unwrap_err().to_string().contains("does not name an absolute path"));
        assert_eq!(decode("100%"), "100%");
    }
}
