#!/usr/bin/env bash
# A bill of materials of the release: every crate with version, licence and source, as CycloneDX JSON.
#
#   scripts/sbom.sh [FEATURES…] > secateur.cdx.json       # e.g. --no-default-features --features service
#
# From Cargo's own metadata and the lock file; the same lock gives the same bytes. Needs python3.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu "$@" | python3 -c '
import json, re, sys
found = json.load(sys.stdin)
locked = re.findall(r"name = \"([^\"]+)\"\nversion = \"([^\"]+)\"\nsource = \"[^\"]+\"\nchecksum = \"([^\"]+)\"",
                    open("Cargo.lock").read())
sums = {(name, version): checksum for name, version, checksum in locked}
by_id = {package["id"]: package for package in found["packages"]}
root = found["resolve"]["root"]
# What is built into the program: normal and build dependencies, none of the tests.
edges = {node["id"]: [dep["pkg"] for dep in node["deps"]
                      if any(kind["kind"] != "dev" for kind in dep["dep_kinds"])]
         for node in found["resolve"]["nodes"]}
reached, open_ = set(), [root]
while open_:
    at = open_.pop()
    if at not in reached:
        reached.add(at)
        open_.extend(edges[at])
ref = lambda id: "pkg:cargo/{name}@{version}".format(**by_id[id])
def component(id):
    package = by_id[id]
    out = {"type": "library", "bom-ref": ref(id), "name": package["name"], "version": package["version"],
           "purl": ref(id)}
    if package.get("license"):
        out["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    checksum = sums.get((package["name"], package["version"]))
    if checksum:
        out["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return out
order = sorted(reached - {root}, key=ref)
bom = {
    "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
    "metadata": {"component": {**component(root), "type": "application"}},
    "components": [component(id) for id in order],
    "dependencies": [{"ref": ref(id), "dependsOn": sorted(ref(dep) for dep in set(edges[id]))}
                     for id in sorted(reached, key=ref)],
}
json.dump(bom, sys.stdout, indent=1)
print()
'
