"""From measurements to a table, and what machine they are of."""
import os
import pathlib
import platform
import statistics
import subprocess

FEATURES = ["avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16"]
PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "lm_eval", "mergekit"]


def first_line(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def machine(python):
    fields = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    memory = pathlib.Path("/proc/meminfo").read_text().split()[1]
    asked = f"from importlib.metadata import version as v; print(*(v(p) for p in {PACKAGES!r}))"
    versions = first_line([python, "-c", asked]).split()
    return {
        "processor": f"{fields.get('vendor_id', '')} {fields.get('model name', 'unknown')}, "
                     f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}",
        "cores": os.cpu_count(), "features": [f for f in FEATURES if f in flags],
        "memory_bytes": int(memory) * 1024, "kernel": platform.release(),
        "rustc": first_line(["rustc", "--version"]), "python": platform.python_version(),
        "secateur": first_line(["git", "-C", pathlib.Path(__file__).parent, "describe", "--always", "--dirty"]),
        **dict(zip(PACKAGES, versions)),
    }


def summary(runs):
    """Of all runs of a contender; of its first failure when it has one."""
    for run in runs:
        if "error" in run:
            return {"error": run["error"]}
    seconds = [s for run in runs for s in run["seconds"]]
    return {
        "median_s": statistics.median(seconds), "min_s": min(seconds), "count": len(seconds),
        "process_s": statistics.median(run["process_s"] for run in runs),
        "process_cpu_s": statistics.median(run["process_cpu_s"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "foreign_cpu": statistics.fmean(run["foreign_cpu"] for run in runs),
        "check": runs[-1].get("check", {}), "note": runs[-1].get("note"),
    }


def compared(rows):
    """With how often a peer takes the time of ours."""
    ours = {row["name"]: row for row in rows}
    for row in rows:
        mine = ours.get(row["against"], {})
        if "median_s" in row and "median_s" in mine:
            row["ratio"] = row["median_s"] / mine["median_s"]
            row["ratio_of_min"] = row["min_s"] / mine["min_s"]
            row["ratio_of_peak"] = row["peak_bytes"] / mine["peak_bytes"]
    return rows


def line(row):
    name = row["name"] if row["against"] else f"**{row['name']}**"
    if "error" in row:
        return f"| {name} | fails | | | | | | |"
    ratio = lambda key: f"{row[key]:.2f}" + (" **we lose**" if row[key] < 1 else "") if key in row else ""
    return (f"| {name} | {row['median_s']:.2f} | {row['min_s']:.2f} | {ratio('ratio')} | "
            f"{row['process_s']:.1f} | {row['process_cpu_s']:.1f} | {row['peak_bytes'] / 1e6:.0f} | {ratio('ratio_of_peak')} |")


def losses(cases):
    """Where a peer is faster or smaller than the one of ours that does the same."""
    for case in cases:
        for row in case["rows"]:
            for key, what in (("ratio", "the time"), ("ratio_of_peak", "the memory")):
                if row.get(key, 1) < 1:
                    yield f"- {case['case']}: {row['name']} takes {row[key]:.2f} of {what} of {row['against']}"
        # Who has no need of a precision takes what is fastest.
        times = {bool(row["against"]): [] for row in case["rows"]}
        for row in case["rows"]:
            if "median_s" in row:
                times[bool(row["against"])].append((row["median_s"], row["name"]))
        if times.get(True) and times.get(False):
            (peer, peer_name), (mine, my_name) = min(times[True]), min(times[False])
            if peer < mine:
                yield f"- {case['case']}: the fastest peer ({peer_name}) takes {peer / mine:.2f} of the time of the fastest of ours ({my_name})"


def markdown(result):
    m = result["machine"]
    runs = [row for case in result["cases"] for row in case["rows"] if "foreign_cpu" in row]
    foreign = statistics.fmean(row["foreign_cpu"] for row in runs) if runs else 0.0
    out = [
        f"{m['processor']}, {m['cores']} cores, {' '.join(m['features'])}, {m['memory_bytes'] / 2**30:.0f} GiB; "
        f"{result['threads']} threads; {result['rounds']} rounds, in turn. secateur {m['secateur']}, {m['rustc']}; Python "
        f"{m['python']}, " + ", ".join(f"{p} {m[p]}" for p in PACKAGES if p in m) + ".",
        f"Other processes took {100 * foreign:.0f} % of the processors meanwhile"
        + (": **this machine was busy; trust no number below.**" if foreign > 0.05 else "."),
        "",
        "Ratios are a peer's median (or peak) over that of ours with the same precision: above 1 we win. The first time of "
        "a process, imports and compilation are in \"whole process\" only.",
    ]
    for case in result["cases"]:
        out += ["", f"### {case['title']}", "",
                "| | median s | min s | ratio | whole process s | its CPU s | peak MB | ratio |",
                "|---|---:|---:|---|---:|---:|---:|---|"]
        out += [line(row) for row in case["rows"]]
        out.append("")
        for row in case["rows"]:
            told = [f"{key} {value:.6g}" for key, value in row.get("check", {}).items()]
            told += [text for text in (row.get("note"), row.get("error")) if text]
            if told:
                out.append(f"- {row['name']}: {'; '.join(told)}")
    lost = list(losses(result["cases"]))
    out += ["", "### Where we lose", "", *(lost or ["Nowhere in this run."])]
    return "\n".join(out) + "\n"
