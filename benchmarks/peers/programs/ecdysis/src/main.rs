//! A server of hyper that ecdysis upgrades on HUP, drained by hyper's graceful shutdown within 30 s.

use std::{convert::Infallible, env, fs, net::SocketAddr, process::exit, time::Duration};

use bytes::Bytes;
use ecdysis::tokio_ecdysis::{SignalKind, StopOnShutdown, TokioEcdysisBuilder};
use futures::StreamExt;
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn, Request, Response};
use hyper_util::{rt::TokioIo, server::graceful::GracefulShutdown};

#[tokio::main]
async fn main() {
    let mut builder = TokioEcdysisBuilder::new(SignalKind::hangup()).unwrap();
    let release: &'static str = load().leak();
    let address: SocketAddr = env::var("ADDRESS").unwrap().parse().unwrap();
    let mut connections = builder
        .build_listen_tcp(StopOnShutdown::Yes, address, |socket, address| {
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(1024)?;
            Ok(socket.into())
        })
        .unwrap();
    let server = tokio::spawn(async move {
        let graceful = GracefulShutdown::new();
        while let Some(Ok(connection)) = connections.next().await {
            let service = service_fn(move |request| answer(request, release));
            let served = http1::Builder::new().serve_connection(TokioIo::new(connection), service);
            tokio::spawn(graceful.watch(served));
        }
        graceful.shutdown().await;
    });
    let (_ecdysis, upgraded) = builder.ready().unwrap();
    let _ = upgraded.await;
    tokio::spawn(async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        exit(1);
    });
    server.await.unwrap();
}

async fn answer(request: Request<Incoming>, release: &str) -> Result<Response<Full<Bytes>>, Infallible> {
    let parts: Vec<&str> = request.uri().path().trim_matches('/').split('/').collect();
    if parts[0] == "slow" {
        tokio::time::sleep(Duration::from_secs_f64(parts[1].parse().unwrap())).await;
    }
    Ok(Response::new(Full::new(Bytes::from(format!("{release} {}", parts[parts.len() - 1])))))
}

/// Reads the release, which takes as long as that of an application.
fn load() -> String {
    let release = fs::read_to_string(env::var("RELEASE_FILE").unwrap()).unwrap();
    if release == "broken" {
        eprintln!("a release that does not start");
        exit(1);
    }
    let seconds: f64 = env::var("IMPORT_SECONDS").unwrap().parse().unwrap();
    std::thread::sleep(Duration::from_secs_f64(seconds));
    release
}
