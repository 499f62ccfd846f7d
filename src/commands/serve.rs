//! `decdec serve`

use std::net::{TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use decdec::device;
use decdec::engine::{self, Compensate};
use decdec::open::Opened;
use decdec::serve::{App, Ending, Keys, Line, Options, Scheduler, Server, Slots};
use decdec::tokenizer::{TextFiles, Tokenizer};

use crate::cli::ServeArgs;
use crate::output;

/// Tokens of the longest text where nobody says how many.
const DEFAULT_SEQ_LEN: usize = 8192;

/// Runs the command: the server on threads of its own, the engine on this one.
pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let keys = args.api_key_file.as_deref().map(Keys::read).transpose()?.unwrap_or_default();
    let listener = listen(&args.host, args.port as u16)?;
    let local = listener.local_addr()?.ip().is_loopback();
    ensure!(
        local || !keys.is_empty(),
        "--host {} lets other machines ask, give --api-key-file, or put a proxy before 127.0.0.1",
        args.host
    );
    let opened = super::open(&args.model, args.run.compat_scale_order)?;
    opened.expect(args.model.backend, args.model.width.bitwidth, args.model.named.model_name.as_deref())?;
    let stand_in = args.tokenizer.as_deref().map(TextFiles::read).transpose()?;
    let tokenizer = match &stand_in {
        Some(files) => Arc::new(Tokenizer::new(files, opened.weights().config())?),
        None => {
            opened.tokenizer().context("a server needs a tokenizer, name a directory that has one with --tokenizer")?
        }
    };
    let device = super::devices::open(&args.run, device::Options::default())?;
    let weights = opened.weights();
    let quantized = (0..weights.config().layers.len()).any(|layer| weights.bits(layer).is_some());
    let served = Options {
        names: names(args, &opened),
        max_seq_len: max_seq_len(args, &opened)?,
        adjustable: quantized && (args.adjustable || (local && keys.is_empty())),
        keys,
        body_limit: args.body_limit << 20,
        origins: args.cors.clone(),
        compensate_prompt: args.compensate_prompt,
        chat_template: stand_in.as_ref().or(opened.texts()).and_then(|texts| texts.chat_template.clone()),
        device: device.info().id.clone(),
    };
    let max_seq_len = served.max_seq_len;
    let line = Arc::new(Line::new(args.queue));
    let seconds = |seconds: usize| Duration::from_secs(seconds as u64);
    let ending = Ending { notice: seconds(args.drain_notice), limit: seconds(args.drain_limit) };
    let app = App::new(Arc::clone(&line), Arc::clone(&tokenizer), served);
    let server = Server::start(listener, app, args.connections, ending)?;
    let address = server.address();
    let options = super::options(&device, &opened, &args.run, max_seq_len, true, Compensate::Tuned)?;
    let engine = super::load(&device, &opened, &engine::Options { slots: args.slots, ..options })?;
    let texts = Slots::new(&engine, args.slots)?;
    let patience = Duration::from_millis(args.max_wait as u64);
    let mut scheduler = Scheduler::new(texts, &line, &tokenizer, patience);
    output::line(format_args!("serving on http://{address}, {} texts of {max_seq_len} tokens", args.slots))?;
    ready();
    let result = scheduler.run();
    match result {
        // The texts are made: what is left is to see them off.
        Ok(()) => server.wait(),
        // Those who wait have been told.
        Err(_) => std::thread::sleep(Duration::from_millis(200)),
    }
    Ok(result?)
}

fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let cannot = || format!("cannot listen on {host}:{port}");
    let addresses: Vec<_> = (host, port).to_socket_addrs().with_context(cannot)?.collect();
    TcpListener::bind(&addresses[..])
        .with_context(|| format!("{}, is another server running, or give another --port", cannot()))
}

fn names(args: &ServeArgs, opened: &Opened) -> Vec<String> {
    args.served_model_name.clone().unwrap_or_else(|| vec![opened.name().to_owned()])
}

fn max_seq_len(args: &ServeArgs, opened: &Opened) -> Result<usize> {
    let most = opened.weights().config().max_position_embeddings;
    let asked = args.max_seq_len.unwrap_or(most.min(DEFAULT_SEQ_LEN));
    ensure!(asked <= most, "--max-seq-len is {asked}, 1 to {most} (the model's context) are allowed");
    Ok(asked)
}

/// Tells systemd, where it has started this process, that texts are taken now.
fn ready() {
    #[cfg(target_os = "linux")]
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = notify(&socket)
    {
        tracing::warn!("cannot tell systemd that the server is ready: {error}");
    }
}

#[cfg(target_os = "linux")]
fn notify(socket: &std::ffi::OsStr) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address).map(drop)
}
