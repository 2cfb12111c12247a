//! The guest's one program: the service, and what shows that its processor and its clock survived.
//!
//! ```text
//! guest-tool serve DISK PORT DIVERGE-PERCENT   the key-value service (serve.rs, kv.rs)
//! guest-tool registers                         sums in all sixteen AVX (or SSE) registers, held live; an error ends it
//! guest-tool tick                              each second the monotonic and the real time
//! guest-tool load PAGES                        writes that many pages of 8 MiB each second, as a database would
//! ```
//!
//! All of them speak on the console in lines that begin with `GUEST-`. Compiled by `image.sh` with plain rustc, static.

mod kv;
mod serve;

use std::arch::asm;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

/// Loops of one round: long enough to be interrupted at times, short enough to leave an emulated processor to others.
const LOOPS: u64 = 20_000;
/// Rounds between two reports.
const REPORT_ROUNDS: u64 = 50;

/// `struct timespec` of clock_gettime(2), on x86-64.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanos: i64,
}

unsafe extern "C" {
    fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
}

fn clock_ms(clock: i32) -> i64 {
    let mut time = Timespec { seconds: 0, nanos: 0 };
    // SAFETY: `time` is a live timespec of the C library's layout.
    unsafe { clock_gettime(clock, &mut time) };
    time.seconds * 1000 + time.nanos / 1_000_000
}

/// Says the time each second. What goes back, or jumps, shows in the difference of two lines.
fn tick() -> ! {
    let mut last = clock_ms(1);
    for n in 0_u64.. {
        let (monotonic, real) = (clock_ms(1), clock_ms(0));
        let backwards = if monotonic < last { " BACKWARDS" } else { "" };
        println!("GUEST-TICK {n} monotonic_ms={monotonic} real_ms={real}{backwards}");
        last = monotonic;
        sleep(Duration::from_secs(1));
    }
    unreachable!("2^64 seconds are over")
}

const PAGE_BYTES: usize = 4096;
const LOAD_PAGES: usize = 2048;
/// Times in a second that the load does its share.
const LOAD_HZ: usize = 50;
/// One page in so many is filled anew; of the others a row of 64 bytes changes.
const LOAD_WHOLE: usize = 16;

/// Writes memory: rows here and there, and now and then a page of what cannot be foretold.
fn load(pages_a_second: usize) -> ! {
    let mut memory = vec![0_u8; LOAD_PAGES * PAGE_BYTES];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    loop {
        for n in 0..pages_a_second / LOAD_HZ {
            let page = next() as usize % LOAD_PAGES * PAGE_BYTES;
            let (from, bytes) = if n % LOAD_WHOLE == 0 { (page, PAGE_BYTES) } else { (page + next() as usize % 64 * 64, 64) };
            for word in memory[from..from + bytes].chunks_exact_mut(8) {
                word.copy_from_slice(&next().to_ne_bytes());
            }
        }
        sleep(Duration::from_millis(1000 / LOAD_HZ as u64));
    }
}

/// One round: registers 0 to 7 get registers 8 to 15 added `loops` times, and nothing is in memory meanwhile.
#[target_feature(enable = "avx")]
fn avx_round(registers: &mut [[f64; 4]; 16], loops: u64) {
    // SAFETY: reads and writes exactly the sixteen registers' 512 bytes, and names every register it changes.
    unsafe {
        asm!(
            "vmovupd ymm0, [{p}]", "vmovupd ymm1, [{p} + 32]", "vmovupd ymm2, [{p} + 64]", "vmovupd ymm3, [{p} + 96]",
            "vmovupd ymm4, [{p} + 128]", "vmovupd ymm5, [{p} + 160]", "vmovupd ymm6, [{p} + 192]", "vmovupd ymm7, [{p} + 224]",
            "vmovupd ymm8, [{p} + 256]", "vmovupd ymm9, [{p} + 288]", "vmovupd ymm10, [{p} + 320]", "vmovupd ymm11, [{p} + 352]",
            "vmovupd ymm12, [{p} + 384]", "vmovupd ymm13, [{p} + 416]", "vmovupd ymm14, [{p} + 448]", "vmovupd ymm15, [{p} + 480]",
            "2:",
            "vaddpd ymm0, ymm0, ymm8", "vaddpd ymm1, ymm1, ymm9", "vaddpd ymm2, ymm2, ymm10", "vaddpd ymm3, ymm3, ymm11",
            "vaddpd ymm4, ymm4, ymm12", "vaddpd ymm5, ymm5, ymm13", "vaddpd ymm6, ymm6, ymm14", "vaddpd ymm7, ymm7, ymm15",
            "dec {n}",
            "jnz 2b",
            "vmovupd [{p}], ymm0", "vmovupd [{p} + 32], ymm1", "vmovupd [{p} + 64], ymm2", "vmovupd [{p} + 96], ymm3",
            "vmovupd [{p} + 128], ymm4", "vmovupd [{p} + 160], ymm5", "vmovupd [{p} + 192], ymm6", "vmovupd [{p} + 224], ymm7",
            "vmovupd [{p} + 256], ymm8", "vmovupd [{p} + 288], ymm9", "vmovupd [{p} + 320], ymm10", "vmovupd [{p} + 352], ymm11",
            "vmovupd [{p} + 384], ymm12", "vmovupd [{p} + 416], ymm13", "vmovupd [{p} + 448], ymm14", "vmovupd [{p} + 480], ymm15",
            p = in(reg) registers.as_mut_ptr(),
            n = inout(reg) loops => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
            out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}

/// The same in registers of half the width, which every processor of this architecture has.
fn sse_round(registers: &mut [[f64; 2]; 16], loops: u64) {
    // SAFETY: reads and writes exactly the sixteen registers' 256 bytes, and names every register it changes.
    unsafe {
        asm!(
            "movupd xmm0, [{p}]", "movupd xmm1, [{p} + 16]", "movupd xmm2, [{p} + 32]", "movupd xmm3, [{p} + 48]",
            "movupd xmm4, [{p} + 64]", "movupd xmm5, [{p} + 80]", "movupd xmm6, [{p} + 96]", "movupd xmm7, [{p} + 112]",
            "movupd xmm8, [{p} + 128]", "movupd xmm9, [{p} + 144]", "movupd xmm10, [{p} + 160]", "movupd xmm11, [{p} + 176]",
            "movupd xmm12, [{p} + 192]", "movupd xmm13, [{p} + 208]", "movupd xmm14, [{p} + 224]", "movupd xmm15, [{p} + 240]",
            "2:",
            "addpd xmm0, xmm8", "addpd xmm1, xmm9", "addpd xmm2, xmm10", "addpd xmm3, xmm11",
            "addpd xmm4, xmm12", "addpd xmm5, xmm13", "addpd xmm6, xmm14", "addpd xmm7, xmm15",
            "dec {n}",
            "jnz 2b",
            "movupd [{p}], xmm0", "movupd [{p} + 16], xmm1", "movupd [{p} + 32], xmm2", "movupd [{p} + 48], xmm3",
            "movupd [{p} + 64], xmm4", "movupd [{p} + 80], xmm5", "movupd [{p} + 96], xmm6", "movupd [{p} + 112], xmm7",
            "movupd [{p} + 128], xmm8", "movupd [{p} + 144], xmm9", "movupd [{p} + 160], xmm10", "movupd [{p} + 176], xmm11",
            "movupd [{p} + 192], xmm12", "movupd [{p} + 208], xmm13", "movupd [{p} + 224], xmm14", "movupd [{p} + 240], xmm15",
            p = in(reg) registers.as_mut_ptr(),
            n = inout(reg) loops => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        );
    }
}

/// Rounds for ever; the first wrong register ends it.
fn rounds<const LANES: usize>(name: &str, run: impl Fn(&mut [[f64; LANES]; 16])) -> ExitCode {
    for round in 1_u64.. {
        // Whole numbers below 2^53: sums are exact, and each lane of each register has its own.
        let seed = (round % 1000) as f64;
        let before: [[f64; LANES]; 16] =
            std::array::from_fn(|register| std::array::from_fn(|lane| seed + (register * LANES + lane) as f64));
        let mut after = before;
        run(&mut after);
        for register in 0..16 {
            for lane in 0..LANES {
                let mut wanted = before[register][lane];
                if register < 8 {
                    wanted += before[register + 8][lane] * LOOPS as f64;
                }
                let got = after[register][lane];
                if got != wanted {
                    println!(
                        "GUEST-{name} ERROR round {round}: register {register} lane {lane} is {got}, not {wanted}"
                    );
                    return ExitCode::FAILURE;
                }
            }
        }
        if round % REPORT_ROUNDS == 1 {
            println!("GUEST-{name} ok, {round} rounds");
        }
        // Leaves the processor to the service: what matters is that registers live across many interruptions.
        sleep(Duration::from_millis(250));
    }
    ExitCode::SUCCESS
}

fn registers() -> ExitCode {
    if is_x86_feature_detected!("avx") {
        // SAFETY: AVX was found.
        rounds("AVX", |registers| unsafe { avx_round(registers, LOOPS) })
    } else {
        rounds("SSE", |registers| sse_round(registers, LOOPS))
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["tick"] => tick(),
        ["registers"] => registers(),
        ["load", pages] => match pages.parse() {
            Ok(pages) => load(pages),
            Err(_) => ExitCode::from(2),
        },
        ["serve", disk, port, diverge] => match (port.parse(), diverge.parse()) {
            (Ok(port), Ok(diverge)) => {
                let Err(why) = serve::run(disk, port, diverge) else { return ExitCode::SUCCESS };
                println!("GUEST-ERROR {why}");
                ExitCode::FAILURE
            }
            _ => ExitCode::from(2),
        },
        _ => {
            eprintln!("guest-tool serve DISK PORT DIVERGE-PERCENT | registers | tick | load PAGES");
            ExitCode::from(2)
        }
    }
}
