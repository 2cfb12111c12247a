//! The guest's one program: the service, and what shows that its processor and its clock survived.
//!
//! ```text
//! guest-tool serve DISK PORT DIVERGE-PERCENT   the key-value service (serve.rs, kv.rs)
//! guest-tool avx                               sums in all sixteen AVX registers, held live; an error ends it
//! guest-tool tick                              each second the monotonic and the real time
//! ```
//!
//! All of them speak on the console in lines that begin with `GUEST-`. Compiled by `image.sh` with plain rustc, static.

mod kv;
mod serve;

use std::arch::asm;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

/// Loops of one AVX round: under emulation about a tenth of a second.
const AVX_LOOPS: u64 = 1_000_000;
/// Rounds between two reports.
const AVX_REPORT_ROUNDS: u64 = 50;

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

/// One round: registers 0 to 7 get registers 8 to 15 added `loops` times, and nothing is in memory meanwhile.
///
/// # Safety
/// The processor must have AVX.
#[target_feature(enable = "avx")]
unsafe fn avx_round(registers: &mut [[f64; 4]; 16], loops: u64) {
    // SAFETY: reads and writes exactly the sixteen registers' 512 bytes, and names every register it changes.
    unsafe {
        asm!(
            "vmovupd ymm0, [{p}]", "vmovupd ymm1, [{p} + 32]", "vmovupd ymm2, [{p} + 64]", "vmovupd ymm3, [{p} + 96]",
            "vmovupd ymm4, [{p} + 128]", "vmovupd ymm5, [{p} + 160]", "vmovupd ymm6, [{p} + 192]",
            "vmovupd ymm7, [{p} + 224]", "vmovupd ymm8, [{p} + 256]", "vmovupd ymm9, [{p} + 288]",
            "vmovupd ymm10, [{p} + 320]", "vmovupd ymm11, [{p} + 352]", "vmovupd ymm12, [{p} + 384]",
            "vmovupd ymm13, [{p} + 416]", "vmovupd ymm14, [{p} + 448]", "vmovupd ymm15, [{p} + 480]",
            "2:",
            "vaddpd ymm0, ymm0, ymm8", "vaddpd ymm1, ymm1, ymm9", "vaddpd ymm2, ymm2, ymm10",
            "vaddpd ymm3, ymm3, ymm11", "vaddpd ymm4, ymm4, ymm12", "vaddpd ymm5, ymm5, ymm13",
            "vaddpd ymm6, ymm6, ymm14", "vaddpd ymm7, ymm7, ymm15",
            "dec {n}",
            "jnz 2b",
            "vmovupd [{p}], ymm0", "vmovupd [{p} + 32], ymm1", "vmovupd [{p} + 64], ymm2", "vmovupd [{p} + 96], ymm3",
            "vmovupd [{p} + 128], ymm4", "vmovupd [{p} + 160], ymm5", "vmovupd [{p} + 192], ymm6",
            "vmovupd [{p} + 224], ymm7", "vmovupd [{p} + 256], ymm8", "vmovupd [{p} + 288], ymm9",
            "vmovupd [{p} + 320], ymm10", "vmovupd [{p} + 352], ymm11", "vmovupd [{p} + 384], ymm12",
            "vmovupd [{p} + 416], ymm13", "vmovupd [{p} + 448], ymm14", "vmovupd [{p} + 480], ymm15",
            p = in(reg) registers.as_mut_ptr(),
            n = inout(reg) loops => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
            out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}

/// Rounds for ever; the first wrong register ends it.
fn avx() -> ExitCode {
    if !is_x86_feature_detected!("avx") {
        println!("GUEST-AVX SKIP: the processor has no AVX");
        return ExitCode::SUCCESS;
    }
    for round in 1_u64.. {
        // Whole numbers below 2^53: sums are exact, and each lane of each register has its own.
        let seed = (round % 1000) as f64;
        let before: [[f64; 4]; 16] =
            std::array::from_fn(|register| std::array::from_fn(|lane| seed + (register * 4 + lane) as f64));
        let mut after = before;
        // SAFETY: AVX was found above.
        unsafe { avx_round(&mut after, AVX_LOOPS) };
        for register in 0..16 {
            for lane in 0..4 {
                let mut wanted = before[register][lane];
                if register < 8 {
                    wanted += before[register + 8][lane] * AVX_LOOPS as f64;
                }
                let got = after[register][lane];
                if got != wanted {
                    println!("GUEST-AVX ERROR round {round}: ymm{register} lane {lane} is {got}, not {wanted}");
                    return ExitCode::FAILURE;
                }
            }
        }
        if round % AVX_REPORT_ROUNDS == 1 {
            println!("GUEST-AVX ok, {round} rounds");
        }
        // Leaves the processor to the service: what matters is that registers live across many interruptions.
        sleep(Duration::from_millis(100));
    }
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["tick"] => tick(),
        ["avx"] => avx(),
        ["serve", disk, port, diverge] => match (port.parse(), diverge.parse()) {
            (Ok(port), Ok(diverge)) => {
                let Err(why) = serve::run(disk, port, diverge) else { return ExitCode::SUCCESS };
                println!("GUEST-ERROR {why}");
                ExitCode::FAILURE
            }
            _ => ExitCode::from(2),
        },
        _ => {
            eprintln!("guest-tool serve DISK PORT DIVERGE-PERCENT | avx | tick");
            ExitCode::from(2)
        }
    }
}
