//! The Sandbox service: a pod without a pause container (containerd api/runtime/sandbox/v1). The shim holds what its
//! containers share: namespaces by a small process, /dev/shm, hosts, hostname and resolv.conf in the bundle.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, MessageField, rt};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox as SandboxService;
use containerd_shim_protos::ttrpc::Result as TtrpcResult;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Mount, MountBuilder, Spec};
use skiff::cgroup::Cgroup;
use skiff::launch::{Exit, pod};
use skiff::{Error, Kind, Result};

use crate::error::precondition;
use crate::events::timestamp;
use crate::io::Paths;
use crate::pending::Call;
use crate::process::{Phase, Process, settle};
use crate::task::{Service, Shim};

const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// A pod.
pub struct Sandbox {
    id: String,
    bundle: PathBuf,
    config: Config,
    netns: Option<CString>,
    holder: Rc<Process>,
    created: SystemTime,
}

/// What a PodSandboxConfig of CRI (runtime.v1) asks of the shim.
#[derive(Debug, Default, PartialEq, Eq)]
struct Config {
    hostname: String,
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
    cgroup_parent: String,
    sysctls: BTreeMap<String, String>,
    /// NamespaceMode of CRI: POD 0, CONTAINER 1, NODE 2.
    network: u64,
    pid: u64,
    ipc: u64,
    /// Its user namespace, if it has one.
    users: Option<Users>,
}

/// The host's uid and gid of root in a pod's user namespace.
type Users = Option<(u32, u32)>;

const NODE: u64 = 2;

type Parsed<T> = containerd_shim_protos::protobuf::Result<T>;

/// Calls `field` with the number of each field and the stream, which has to be read past it; false passes it over.
fn message(bytes: &[u8], mut field: impl FnMut(u32, &mut CodedInputStream<'_>) -> Parsed<bool>) -> Parsed<()> {
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        if !field(tag, &mut input)? {
            rt::skip_field_for_tag(tag, &mut input)?;
        }
    }
    Ok(())
}

/// UserNamespace: the host's uid and gid of its root; of none in a mode that pods cannot have. None when the pod has the
/// node's, mode NODE.
fn users(bytes: &[u8]) -> Parsed<Option<Users>> {
    let (mut mode, mut uid, mut gid) = (0, None, None);
    message(bytes, |tag, input| {
        match tag {
            8 => mode = input.read_uint64()?,
            18 => uid = uid.or(root(&input.read_bytes()?)?),
            26 => gid = gid.or(root(&input.read_bytes()?)?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let root = uid.zip(gid).filter(|_| mode == 0);
    Ok(Some(root).filter(|_| mode != NODE))
}

/// IDMapping: the host's id of 0, if it is in it.
fn root(bytes: &[u8]) -> Parsed<Option<u32>> {
    let (mut host, mut container) = (0, 0);
    message(bytes, |tag, input| {
        match tag {
            8 => host = input.read_uint32()?,
            16 => container = input.read_uint32()?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(Some(host).filter(|_| container == 0))
}

impl Config {
    /// Tags are field numbers with their wire types: 8n for numbers, 8n+2 for text and messages.
    fn parse(bytes: &[u8]) -> Parsed<Config> {
        let mut out = Config::default();
        message(bytes, |tag, input| {
            match tag {
                18 => out.hostname = input.read_string()?,
                34 => message(&input.read_bytes()?, |tag, input| {
                    match tag {
                        10 => out.servers.push(input.read_string()?),
                        18 => out.searches.push(input.read_string()?),
                        26 => out.options.push(input.read_string()?),
                        _ => return Ok(false),
                    }
                    Ok(true)
                })?,
                66 => out.linux(&input.read_bytes()?)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(out)
    }

    fn linux(&mut self, bytes: &[u8]) -> Parsed<()> {
        message(bytes, |tag, input| {
            match tag {
                10 => self.cgroup_parent = input.read_string()?,
                18 => message(&input.read_bytes()?, |tag, input| match tag {
                    10 => self.namespaces(&input.read_bytes()?).map(|()| true),
                    _ => Ok(false),
                })?,
                26 => {
                    let (mut key, mut value) = (String::new(), String::new());
                    message(&input.read_bytes()?, |tag, input| {
                        match tag {
                            10 => key = input.read_string()?,
                            18 => value = input.read_string()?,
                            _ => return Ok(false),
                        }
                        Ok(true)
                    })?;
                    self.sysctls.insert(key, value);
                }
                _ => return Ok(false),
            }
            Ok(true)
        })
    }

    fn namespaces(&mut self, bytes: &[u8]) -> Parsed<()> {
        message(bytes, |tag, input| {
            match tag {
                8 => self.network = input.read_uint64()?,
                16 => self.pid = input.read_uint64()?,
                24 => self.ipc = input.read_uint64()?,
                42 => self.users = users(&input.read_bytes()?)?,
                _ => return Ok(false),
            }
            Ok(true)
        })
    }

    fn resolv_conf(&self) -> Option<String> {
        if self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty() {
            return None;
        }
        let mut out = String::new();
        if !self.searches.is_empty() {
            out += &format!("search {}\n", self.searches.join(" "));
        }
        for server in &self.servers {
            out += &format!("nameserver {server}\n");
        }
        if !self.options.is_empty() {
            out += &format!("options {}\n", self.options.join(" "));
        }
        Some(out)
    }
}

impl Sandbox {
    fn create(request: &CreateSandboxRequest) -> Result<Sandbox> {
        skiff::state::check_id(&request.sandbox_id)?;
        let config = match request.options.as_ref().filter(|any| any.type_url.ends_with("PodSandboxConfig")) {
            Some(any) => Config::parse(&any.value).map_err(|e| Error::invalid("options", e))?,
            None => Config::default(),
        };
        let field = "options: linux.security_context.namespace_options.userns_options";
        match config.users {
            Some(None) => return Err(Error::invalid(field, "must map root, in mode POD")),
            Some(_) if config.network == NODE => {
                return Err(Error::invalid(field, "needs a network of the pod's own").with_kind(Kind::Unsupported));
            }
            _ => {}
        }
        let netns = Some(&request.netns_path).filter(|path| !path.is_empty() && config.network != NODE);
        let netns = netns.map(|path| CString::new(path.as_str())).transpose();
        let sandbox = Sandbox {
            id: request.sandbox_id.clone(),
            bundle: PathBuf::from(&request.bundle_path),
            config,
            netns: netns.map_err(|_| Error::invalid("netns_path", "contains a NUL byte"))?,
            holder: Process::new("", Paths::default()),
            created: SystemTime::now(),
        };
        if let Err(err) = sandbox.files() {
            sandbox.remove_files();
            return Err(err);
        }
        Ok(sandbox)
    }

    /// What the containers of a pod share beside namespaces, as CRI makes it for a pause container.
    fn files(&self) -> Result<()> {
        let (uid, gid) = self.config.users.flatten().unwrap_or_default();
        let write = |name: &str, text: &str| {
            let path = self.bundle.join(name);
            std::fs::write(&path, text)
                .and_then(|()| std::os::unix::fs::chown(&path, Some(uid), Some(gid)))
                .map_err(|e| Error::io(format!("write {:?}", path.display().to_string()), &e))
        };
        let host = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let hostname = match self.config.hostname.as_str() {
            "" => host("/etc/hostname"),
            name => format!("{name}\n"),
        };
        write("hostname", &hostname)?;
        write("hosts", &host("/etc/hosts"))?;
        write("resolv.conf", &self.config.resolv_conf().unwrap_or_else(|| host("/etc/resolv.conf")))?;
        if self.config.ipc == NODE {
            return Ok(());
        }
        let shm = self.bundle.join("shm");
        let fail = |e| Error::io(format!("make {:?}", shm.display().to_string()), &e);
        std::fs::create_dir(&shm).or_else(|e| if shm.is_dir() { Ok(()) } else { Err(e) }).map_err(fail)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let options = format!("mode=1777,size=65536k,uid={uid},gid={gid}");
        mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(options.as_str()))
            .map_err(|errno| Error::sys(format!("mount tmpfs at {:?}", shm.display().to_string()), errno))
    }

    fn remove_files(&self) {
        remove_files(&self.bundle);
    }

    async fn start(&self) -> Result<u32> {
        if self.holder.phase() != Phase::Created {
            return Err(precondition("sandbox has been started"));
        }
        let mut namespaces = 0;
        if self.config.ipc != NODE {
            namespaces |= libc::CLONE_NEWIPC as u64;
        }
        if self.config.network != NODE {
            namespaces |= libc::CLONE_NEWUTS as u64;
        }
        if self.config.pid == 0 {
            namespaces |= libc::CLONE_NEWPID as u64;
        }
        let hostname = Some(self.config.hostname.as_str()).filter(|name| !name.is_empty());
        let hostname = hostname.filter(|_| namespaces & libc::CLONE_NEWUTS as u64 != 0);
        let mut sysctls = Vec::new();
        if self.config.network != NODE {
            // What CRI gives pods by default; a kernel without them does without.
            sysctls.push(("net.ipv4.ip_unprivileged_port_start", "0", true));
            sysctls.push(("net.ipv4.ping_group_range", "0 2147483647", true));
        }
        sysctls.extend(self.config.sysctls.iter().map(|(key, value)| (key.as_str(), value.as_str(), false)));
        let holding = pod::hold(&pod::Pod {
            id: &self.id,
            namespaces,
            netns: self.netns.as_deref(),
            in_user_namespace: self.config.users.is_some(),
            hostname,
            sysctls: &sysctls,
        })?;
        self.holder.set_phase(Phase::Starting);
        let held = settle(holding).await.and_then(|child| self.holder.set_child(child));
        if held.is_err() {
            self.holder.set_phase(Phase::Created);
        }
        held?;
        self.holder.set_phase(Phase::Running);
        let holder = self.holder.clone();
        tokio::task::spawn_local(async move {
            let exit = holder.reap().await.unwrap_or(Exit { status: 255, at: SystemTime::now() });
            holder.set_exit(exit);
        });
        Ok(self.holder.pid())
    }

    async fn stop(&self) {
        self.holder.settled().await;
        match self.holder.phase() {
            Phase::Created => self.holder.set_exit(Exit { status: 0, at: SystemTime::now() }),
            _ => {
                let _ = self.holder.kill(libc::SIGKILL);
            }
        }
        let _ = self.holder.wait().await;
    }

    /// Gives the spec of a container what CRI cannot know of: the shim's own files.
    pub fn complete(&self, spec: &mut Spec) -> Result<()> {
        let readonly = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let bind = |at: &str, name: &str, mode: &str| -> Result<Mount> {
            let options = ["rbind", "rprivate", mode].map(String::from).to_vec();
            let mount = MountBuilder::default().destination(at).typ("bind").source(self.bundle.join(name));
            mount.options(options).build().map_err(|e| Error::invalid("mounts", e))
        };
        for name in ["hostname", "hosts", "resolv.conf"] {
            let at = format!("/etc/{name}");
            if mounts.iter().all(|mount| mount.destination() != Path::new(&at)) {
                mounts.push(bind(&at, name, if readonly { "ro" } else { "rw" })?);
            }
        }
        if self.config.ipc != NODE {
            let shm = Path::new("/dev/shm");
            let own = |mount: &Mount| mount.destination() == shm && mount.typ().as_deref() == Some("tmpfs");
            mounts.retain(|mount| !own(mount));
            if mounts.iter().all(|mount| mount.destination() != shm) {
                mounts.push(bind("/dev/shm", "shm", "rw")?);
            }
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }

    /// The usage of the pod's cgroup, which the kubelet has made.
    fn metrics(&self) -> Result<Any> {
        let host = skiff::host::Cgroups::read()?;
        let parent = self.config.cgroup_parent.trim_start_matches('/');
        let below = match parent.ends_with(".slice") && !parent.contains('/') {
            true => skiff::plan::scope::expand(parent)?,
            false => parent.into(),
        };
        let mut paths = BTreeMap::new();
        for hierarchy in &host.v1 {
            for controller in &hierarchy.controllers {
                paths.insert(controller.clone(), hierarchy.mountpoint.join(&below));
            }
        }
        if let Some(v2) = host.v2.filter(|_| host.v1.is_empty()) {
            paths.insert(String::new(), v2.mountpoint.join(&below));
        }
        Ok(crate::metrics::any(&Cgroup::open(&paths)?.stats()?))
    }
}

/// Removes what a sandbox has made in its bundle; nothing of it may be there.
pub fn remove_files(bundle: &Path) {
    let shm = bundle.join("shm");
    let _ = umount2(&shm, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    let _ = std::fs::remove_dir(&shm);
    for name in ["hostname", "hosts", "resolv.conf"] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
}

/// The sandbox of a shim, if it serves one.
pub type Slot = RefCell<Option<Rc<Sandbox>>>;

fn find(shim: &Shim, id: &str) -> Result<Rc<Sandbox>> {
    let sandbox = shim.sandbox.borrow().clone().filter(|sandbox| sandbox.id == id);
    sandbox.ok_or_else(|| Error::new(Kind::NotFound, format!("sandbox {id:?} not found")))
}

#[async_trait]
impl SandboxService for Service {
    async fn create_sandbox(
        &self,
        context: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> TtrpcResult<CreateSandboxResponse> {
        self.ask(Call::new("CreateSandbox", &request.sandbox_id, "").of(context), move |shim| async move {
            if shim.sandbox.borrow().is_some() {
                return Err(Error::new(Kind::AlreadyExists, "the shim has a sandbox already"));
            }
            let sandbox = Sandbox::create(&request)?;
            *shim.sandbox.borrow_mut() = Some(Rc::new(sandbox));
            Ok(CreateSandboxResponse::default())
        })
        .await
    }

    async fn start_sandbox(
        &self,
        context: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> TtrpcResult<StartSandboxResponse> {
        self.ask(Call::new("StartSandbox", &request.sandbox_id, "").of(context), move |shim| async move {
            let sandbox = find(&shim, &request.sandbox_id)?;
            let pid = sandbox.start().await?;
            let created_at = MessageField::some(timestamp(sandbox.created));
            Ok(StartSandboxResponse { pid, created_at, ..StartSandboxResponse::default() })
        })
        .await
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> TtrpcResult<PlatformResponse> {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let platform = containerd_shim_protos::types::platform::Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            ..Default::default()
        };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..PlatformResponse::default() })
    }

    async fn stop_sandbox(
        &self,
        context: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> TtrpcResult<StopSandboxResponse> {
        self.ask(Call::new("StopSandbox", &request.sandbox_id, "").of(context), move |shim| async move {
            find(&shim, &request.sandbox_id)?.stop().await;
            Ok(StopSandboxResponse::default())
        })
        .await
    }

    async fn wait_sandbox(
        &self,
        context: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> TtrpcResult<WaitSandboxResponse> {
        self.ask(Call::new("WaitSandbox", &request.sandbox_id, "").of(context).only_waits(), move |shim| async move {
            let sandbox = find(&shim, &request.sandbox_id)?;
            let exit = sandbox.holder.wait().await.ok_or_else(|| precondition("the shim is ending"))?;
            let exited_at = MessageField::some(timestamp(exit.at));
            Ok(WaitSandboxResponse { exit_status: exit.status, exited_at, ..WaitSandboxResponse::default() })
        })
        .await
    }

    async fn sandbox_status(
        &self,
        context: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> TtrpcResult<SandboxStatusResponse> {
        self.ask(Call::new("SandboxStatus", &request.sandbox_id, "").of(context), move |shim| async move {
            let sandbox = find(&shim, &request.sandbox_id)?;
            let ready = sandbox.holder.phase() == Phase::Running;
            Ok(SandboxStatusResponse {
                sandbox_id: sandbox.id.clone(),
                pid: sandbox.holder.pid(),
                state: if ready { READY } else { NOT_READY }.into(),
                created_at: MessageField::some(timestamp(sandbox.created)),
                exited_at: sandbox.holder.exit().map(|exit| timestamp(exit.at)).into(),
                ..SandboxStatusResponse::default()
            })
        })
        .await
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> TtrpcResult<PingResponse> {
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        context: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> TtrpcResult<ShutdownSandboxResponse> {
        self.ask(Call::new("ShutdownSandbox", &request.sandbox_id, "").of(context), move |shim| async move {
            if let Ok(sandbox) = find(&shim, &request.sandbox_id) {
                sandbox.stop().await;
                sandbox.remove_files();
                shim.sandbox.borrow_mut().take();
            }
            shim.shutdown();
            Ok(ShutdownSandboxResponse::default())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        context: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> TtrpcResult<SandboxMetricsResponse> {
        self.ask(Call::new("SandboxMetrics", &request.sandbox_id, "").of(context), move |shim| async move {
            let sandbox = find(&shim, &request.sandbox_id)?;
            let mut response = SandboxMetricsResponse::default();
            let metric = response.metrics.mut_or_insert_default();
            metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
            metric.id = sandbox.id.clone();
            metric.data = MessageField::some(sandbox.metrics()?);
            Ok(response)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_config_is_read_as_cri_writes_it() {
        // hostname "h", dns {servers "192.0.2.1", searches "a"}, linux {cgroup_parent "/p", security_context
        // {namespace_options {network NODE, pid CONTAINER}}, sysctls {"k": "v"}}, and a field of a later version.
        let dns = [&[10, 9][..], b"192.0.2.1", &[18, 1], b"a"].concat();
        let linux = [&[10, 2][..], b"/p", &[18, 6, 10, 4, 8, 2, 16, 1], &[26, 6, 10, 1], b"k", &[18, 1], b"v"].concat();
        let bytes =
            [&[18, 1][..], b"h", &[34, dns.len() as u8], &dns, &[66, linux.len() as u8], &linux, &[250, 1, 1, 7]]
                .concat();
        let config = Config::parse(&bytes).unwrap();
        assert_eq!((config.hostname.as_str(), config.cgroup_parent.as_str()), ("h", "/p"));
        assert_eq!((config.network, config.pid, config.ipc), (NODE, 1, 0));
        assert_eq!(config.sysctls["k"], "v");
        assert_eq!(config.users, None);
        assert_eq!(config.resolv_conf().unwrap(), "search a\nnameserver 192.0.2.1\n");
        assert!(Config::parse(&bytes[..bytes.len() - 5]).is_err());
    }

    #[test]
    fn the_users_of_a_pod_are_those_of_its_first_map_of_root() {
        // uids {host 5, container 0, length 9}, gids {host 8, container 7}, gids {host 6}; then the mode.
        let maps = [18, 6, 8, 5, 16, 0, 24, 9, 26, 4, 8, 8, 16, 7, 26, 2, 8, 6];
        assert_eq!(users(&maps).unwrap(), Some(Some((5, 6))));
        assert_eq!(users(&[&maps[..], &[8, NODE as u8]].concat()).unwrap(), None);
        assert_eq!(users(&[&maps[..], &[8, 1]].concat()).unwrap(), Some(None));
        assert_eq!(users(&[]).unwrap(), Some(None));
    }
}
