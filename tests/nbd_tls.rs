//! `xl-colo nbd` encrypted, with libnbd and QEMU as clients: who gets in, and who does not.

use crate::common::{installed, one_line, run, succeeds, xl_colo};
use crate::nbd_command::{Nbd, chosen};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// An authority, a server and a client it has signed, by the names that everybody uses; and a stranger's client.
fn make_certificates(dir: &Path) {
    let authority = |name: &str| {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    };
    let write = |folder: &str, file: &str, text: String| {
        std::fs::create_dir_all(dir.join(folder)).unwrap();
        std::fs::write(dir.join(folder).join(file), text).unwrap();
    };
    let (ours, strangers) = (authority("ours"), authority("a stranger's"));
    for (folder, issuer) in [("pki", &ours), ("stranger", &strangers)] {
        for (role, usage) in
            [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
        {
            let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, role);
            params.extended_key_usages.push(usage);
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, issuer).unwrap();
            write(folder, &format!("{role}-cert.pem"), certificate.pem());
            write(folder, &format!("{role}-key.pem"), key.serialize_pem());
        }
        // The stranger trusts our server; our server does not know the stranger.
        write(folder, "ca-cert.pem", ours.pem());
    }
    write("anonymous", "ca-cert.pem", ours.pem());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_has_a_certificate_gets_in() {
    if installed("nbdinfo").is_none() || installed("qemu-img").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let object = |more: &str| format!("tls-creds-x509,id=tls0,endpoint=server,dir={}/pki{more}", dir.path().display());
    let content: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 509) as u8).collect();
    let nbd = Nbd::serve(&content, &["-t", "-e", "0", "--object", &object(""), "--tls-creds", "tls0"]);
    let uri = |certificates: &str| {
        let (socket, dir) = (nbd.socket(), dir.path().display());
        format!("nbds+unix://localhost/?socket={}&tls-certificates={dir}/{certificates}", socket.display())
    };
    assert_eq!(succeeds("nbdinfo", &["--size", &uri("pki")]).await.trim(), "1048576");
    let (copy, other) = (nbd.path("copy"), nbd.path("other"));
    succeeds("nbdcopy", &[&uri("pki"), &copy]).await;
    assert!(std::fs::read(&copy).unwrap() == content);
    for certificates in ["stranger", "anonymous"] {
        let output = run("nbdcopy", &[&uri(certificates), &other]).await;
        assert!(!output.status.success(), "{certificates} got in");
    }
    assert!(chosen(&nbd.socket()).is_none(), "nothing is served in the clear");
    let output = run("nbdinfo", &["--size", &format!("nbd+unix:///?socket={}", nbd.socket().display())]).await;
    assert!(!output.status.success());
    let credentials = format!("tls-creds-x509,id=t,endpoint=client,dir={}/pki", dir.path().display());
    let drive = format!(
        "driver=nbd,server.type=unix,server.path={},tls-creds=t,tls-hostname=localhost",
        nbd.socket().display()
    );
    succeeds(
        "qemu-img",
        &[
            "compare",
            "--object",
            &credentials,
            "--image-opts",
            &drive,
            &format!("driver=raw,file.driver=file,file.filename={copy}"),
        ],
    )
    .await;
    // Whoever was turned away has harmed nobody.
    assert_eq!(succeeds("nbdinfo", &["--size", &uri("pki")]).await.trim(), "1048576");

    let open = Nbd::serve(&[1; 4096], &["-t", "--object", &object(",verify-peer=off"), "--tls-creds", "tls0"]);
    let anonymous = format!(
        "nbds+unix://localhost/?socket={}&tls-certificates={}/anonymous",
        open.socket().display(),
        dir.path().display()
    );
    assert_eq!(succeeds("nbdinfo", &["--size", &anonymous]).await.trim(), "4096");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) =
        (dir.path().join("image").display().to_string(), dir.path().join("sock").display().to_string());
    std::fs::write(&image, [1; 4096]).unwrap();
    let object = format!("tls-creds-x509,id=tls0,endpoint=server,dir={}", dir.path().display());
    let start = async |id: &str| xl_colo(&["nbd", "-k", &socket, "--object", &object, "--tls-creds", id, &image]).await;
    let said = one_line(&start("tls0").await, 1);
    assert!(said.contains("ca-cert.pem"), "{said}");
    let said = one_line(&start("tls1").await, 1);
    assert!(said.contains("no --object has the id \"tls1\""), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_finish_its_tls_handshake_is_hung_up_on() {
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let object = format!("tls-creds-x509,id=tls0,endpoint=server,dir={}/pki", dir.path().display());
    let nbd = Nbd::serve(&[7; 4096], &["-t", "--object", &object, "--tls-creds", "tls0"]);
    let mut silent = UnixStream::connect(nbd.socket()).unwrap();
    silent.read_exact(&mut [0; 18]).unwrap();
    silent.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
    silent.read_exact(&mut [0; 20]).unwrap();
    // The beginning of a hello of 4 KiB, and then a byte now and then: each is something to read.
    silent.write_all(b"\x16\x03\x01\x10\0").unwrap();
    let begun = Instant::now();
    while silent.write_all(b"\x01").is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(25), "it has its place still");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(begun.elapsed() > Duration::from_secs(5), "it was given no time");
}
