//! The kubelet's side of the Container Runtime Interface, for the tests and the benchmark. Nothing else may depend on it.

/// The messages and the clients that are made from cri.proto.
#[allow(missing_docs, clippy::all)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use cri::image_service_client::ImageServiceClient;
use cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
pub use tonic::{Code, Status};
use tonic::{Request, Response};

/// What a pod is asked for with, at least.
pub fn pod(name: &str, log_directory: String, cgroup_parent: String) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory,
        linux: Some(cri::LinuxPodSandboxConfig { cgroup_parent, ..cri::LinuxPodSandboxConfig::default() }),
        ..cri::PodSandboxConfig::default()
    }
}

/// What a container is asked for with, at least. It logs to `NAME.log`.
pub fn container(name: &str, image: &str, command: &[&str]) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: image.into() }),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}.log"),
        linux: Some(cri::LinuxContainerConfig::default()),
        ..cri::ContainerConfig::default()
    }
}

/// The events of containers and pods, in the order of their coming: an id, and what has become of it. They are taken by a
/// thread of its own, to the end of the server.
#[must_use]
pub fn events(path: &Path) -> Receiver<(String, cri::ContainerEventType)> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let client = Client::new(path);
    std::thread::spawn(move || {
        let mut service = RuntimeServiceClient::new(client.unlimited);
        client.io.block_on(async {
            let Ok(answer) = service.get_container_events(cri::Empty {}).await else { return };
            let mut stream = answer.into_inner();
            while let Ok(Some(event)) = stream.message().await {
                let kind = event.container_event_type();
                if sender.send((event.container_id, kind)).is_err() {
                    return;
                }
            }
        });
    });
    receiver
}

/// The channel of a client.
pub type Channel = tonic::transport::Channel;

/// A client whose calls block, and fail after a minute.
#[derive(Debug)]
pub struct Client {
    io: tokio::runtime::Runtime,
    channel: Channel,
    /// For what goes on for ever.
    unlimited: Channel,
}

impl Client {
    /// For the socket at `path`; it connects when it is first used, and again when the server has been away.
    ///
    /// # Panics
    /// When this machine has no epoll to give.
    pub fn new(path: &Path) -> Client {
        let io = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a tokio runtime");
        let path = path.to_path_buf();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
        let unlimited = io.block_on(async { endpoint.connect_with_connector_lazy(connect.clone()) });
        let endpoint = endpoint.timeout(Duration::from_secs(60));
        let channel = io.block_on(async { endpoint.connect_with_connector_lazy(connect) });
        Client { io, channel, unlimited }
    }

    /// One call of the runtime service: `client.call(request, async |mut service, request| service.status(request).await)`.
    ///
    /// # Errors
    /// What the server answers.
    pub fn call<Q, A>(
        &self,
        request: Q,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Status> {
        let service = RuntimeServiceClient::new(self.channel.clone());
        self.io.block_on(call(service, Request::new(request))).map(Response::into_inner)
    }

    /// The tags of the images that the server has.
    ///
    /// # Errors
    /// What the server answers.
    pub fn images(&self) -> Result<Vec<String>, Status> {
        let mut service = ImageServiceClient::new(self.channel.clone());
        let answer = self.io.block_on(service.list_images(cri::Empty {}))?.into_inner();
        Ok(answer.images.into_iter().flat_map(|image| image.repo_tags).collect())
    }
}
