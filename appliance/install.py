"""Installing a signed bundle, and switching between installed ones.

    lock ► metadata ► manifest ► floors ► space ► copy and hash ► metadata stored ► trial ► switch ► floors raised

Every refusal before the switch leaves the current model as it was. Every step may be killed and repeated: objects
already copied are kept, ``state.json`` changes by one rename, floors lower than the current model's are raised again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from appliance.bundle import VerifiedBundle, check_profiles, stored_chain
from appliance.bundle_writer import write_synced
from appliance.config import Config
from appliance.errors import BundleError, SolocardError, StoreError, TrustError, UsageError
from appliance.floors import Floors
from appliance.journal import Journal
from appliance.layout import Layout
from appliance.lock import change_lock
from appliance.manifest import MAX_MANIFEST_BYTES, Manifest, is_bundle_id
from appliance.meter import Meter, Report
from appliance.model import ModelSpec
from appliance.roots import trusted_root
from appliance.server_link import Restart, restart_server
from appliance.state import State
from appliance.store import Pool, disk_errors, read_small_files, unlisted
from appliance.tree import Tree
from appliance.trial import Trial, run_trial
from appliance.trust import Chain, utc_now
from appliance.tuf_client import read_release
from appliance.wire import Progress


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a change came to. ``restart`` is None when the current model did not change."""

    bundle_id: str
    previous: str
    changed: bool
    copied_bytes: int
    unlisted: tuple[str, ...]
    trial_output: str
    restart: Restart | None


class Installer:
    """Changes which model is installed and current below ``home``; one change at a time, each journaled."""

    def __init__(self, home: Path, report: Report, *, trial: Trial | None = None) -> None:
        self.home, self.layout = home, Layout(home)
        self.config = Config.load(home)
        self._report, self._trial = report, trial or run_trial
        self._journal, self._pool = Journal(home), Pool(home)
        self._start = time.monotonic()

    def install(self, directory: Path) -> Outcome:
        """Verify ``directory`` while copying it, try it, make it current and restart a running server.

        TrustError, BundleError: refused, naming the file. BusyError, SpaceError, StoreError, TrialError as named.
        """
        if not directory.is_dir():
            raise UsageError(f"{directory} is not a directory; name the bundle's directory")
        with disk_errors(self.home), change_lock(self.home):
            try:
                with disk_errors(self.home):
                    outcome = self._install(directory)
            except SolocardError as error:
                self._log_refusal(directory, error)
                raise
        return self._hand_over(outcome)

    def activate(self, bundle_id: str) -> Outcome:
        """Make an installed bundle current: verified again, tried, switched. TrustError below the security floor."""
        with disk_errors(self.home), change_lock(self.home):
            floors = self._recover()
            state = self._state_or_empty()
            bundle = VerifiedBundle.open_installed(self.home, bundle_id)
            counter = bundle.manifest.release_counter
            if floors.security_counter > counter:
                raise TrustError(
                    f"{bundle_id} is release {counter}; a release installed here since forbids every one below "
                    f"{floors.security_counter} for security"
                )
            if state.current == bundle_id:
                return Outcome(bundle_id, state.previous, False, 0, (), "", None)
            output = self._try(bundle_id, state)
            outcome = self._commit(bundle.manifest, bundle.chain, state, output)
        return self._hand_over(outcome)

    def rollback(self) -> Outcome:
        """Make the previous model current again, as :meth:`activate` does."""
        previous = State.read(self.home).previous
        if not previous:
            raise StoreError(f"there is no previous model in {self.home} to go back to")
        return self.activate(previous)

    def remove(self, bundle_id: str) -> int:
        """Delete an installed bundle that is neither current nor previous; bytes freed."""
        with disk_errors(self.home), change_lock(self.home):
            self._recover()
            state = State.read(self.home)
            if bundle_id in (state.current, state.previous):
                which = "current" if bundle_id == state.current else "previous"
                raise UsageError(f"{bundle_id} is the {which} model and stays; activate others first")
            if not is_bundle_id(bundle_id) or not self.layout.metadata(bundle_id).is_dir():
                raise StoreError(f"no bundle {bundle_id!r} is installed in {self.home}")
            self._journal.append("remove", bundle_id=bundle_id)
            return self._pool.remove(bundle_id)

    def _install(self, directory: Path) -> Outcome:
        floors = self._recover()
        stick = Tree(directory)
        chain, floors = self._verify_metadata(stick, floors)
        data = stick.read(chain.manifest_path, MAX_MANIFEST_BYTES)
        chain.check_manifest(data, chain.manifest_path)
        manifest = Manifest.from_bytes(data, chain.manifest_path)
        self._check_release(manifest, chain, floors)
        files = self._check_content(stick, manifest)
        extra = unlisted(stick, manifest, chain)
        bundle_id, state = manifest.bundle_id, State.read(self.home)
        self._journal.append("install", bundle_id=bundle_id, source=str(directory), unlisted=extra[:100],
                             **_versions(chain))  # fmt: skip
        self._say("verify", f"{bundle_id}: signatures and list are good", unlisted=extra)
        self._pool.check_space(self._pool.missing_bytes(manifest))
        copied = self._copy(stick, manifest)
        self._pool.add_bundle(manifest, files, chain)
        VerifiedBundle.open_installed(self.home, bundle_id)
        self._journal.append("verified", bundle_id=bundle_id, copied_bytes=copied)
        if state.current == bundle_id:
            self._raise_floors(manifest, chain)
            return Outcome(bundle_id, state.previous, False, copied, tuple(extra), "", None)
        output = self._try(bundle_id, state)
        return replace(self._commit(manifest, chain, state, output), copied_bytes=copied, unlisted=tuple(extra))

    def _verify_metadata(self, stick: Tree, floors: Floors) -> tuple[Chain, Floors]:
        """Chain and floors; newer roots and a higher security floor are kept at once, whatever comes after."""
        if floors.root_version == 0:
            raise TrustError(f"no root is trusted in {self.home}; run `solocard trust add ROOT.json` first")
        if not (stick.root / "metadata" / "timestamp.json").exists() and (stick.root / "manifest.json").exists():
            raise TrustError(f"{stick.root} is not signed (manifest.json lies bare in it); ask for the signed bundle")
        release = read_release(stick, trusted_root(self.home, floors))
        chain = release.chain
        chain.check_time(max(utc_now(), datetime.fromtimestamp(floors.time_s, UTC)))
        _check_versions(chain, floors)
        for root in release.roots:
            self._journal.append("root", version=root.version, fingerprint=root.fingerprint)
            write_synced(self.layout.root(root.version), root.data)
        if release.roots:
            floors = floors.raised(root_version=chain.root_version).write(self.home)
        return chain, floors

    def _check_release(self, manifest: Manifest, chain: Chain, floors: Floors) -> None:
        counter = manifest.release_counter
        if chain.min_secure_counter > counter:
            raise TrustError(f"{chain.manifest_path}: release {counter} forbids itself (min_secure_counter)")
        lowest = max(floors.release_counter, floors.security_counter)
        if counter < lowest:
            raise TrustError(
                f"{chain.manifest_path} is release {counter}, older than release {lowest} installed here before; "
                "`solocard rollback` goes back to an installed one"
            )
        if chain.min_secure_counter > floors.security_counter:
            floors.raised(security_counter=chain.min_secure_counter).write(self.home)

    def _check_content(self, stick: Tree, manifest: Manifest) -> dict[str, bytes]:
        files = read_small_files(stick, manifest)
        check_profiles(ModelSpec.from_json(files["model.json"].decode("utf-8", "replace")), manifest, "model.json")
        if "tokenizer.json" not in files:
            raise BundleError(f"{stick.root} lists no tokenizer.json; it was built for tests and cannot be served")
        return files

    def _copy(self, stick: Tree, manifest: Manifest) -> int:
        total = sum(entry.size_bytes for entry in manifest.objects)
        meter = Meter(self._report, "copy", "copying and checking", total)
        copied = sum(self._pool.add_object(stick, entry, meter.tick) for entry in manifest.objects)
        meter.finish(f"{copied:,} bytes copied, every byte checked")
        return copied

    def _try(self, bundle_id: str, state: State) -> str:
        self._say("trial", f"{bundle_id} answers its golden prompts in a process of its own")
        replace(state, trial=bundle_id).write(self.home)
        try:
            output = self._trial(self.home, bundle_id, self.config.install.trial_timeout_s)
        except SolocardError as error:
            state.write(self.home)
            self._journal.append("trial", bundle_id=bundle_id, ok=False, output=str(error)[-1000:])
            raise
        self._journal.append("trial", bundle_id=bundle_id, ok=True, output=output[-1000:])
        self._say("trial", output.splitlines()[-1] if output else "passed")
        return output

    def _commit(self, manifest: Manifest, chain: Chain, state: State, output: str) -> Outcome:
        bundle_id = manifest.bundle_id
        self._journal.append("switch", bundle_id=bundle_id, previous=state.current)
        State(current=bundle_id, previous=state.current or state.previous).write(self.home)
        self._raise_floors(manifest, chain)
        self._say("switch", f"{bundle_id} is current" + (f"; before it {state.current}" if state.current else ""))
        return Outcome(bundle_id, state.current, True, 0, (), output, None)

    def _hand_over(self, outcome: Outcome) -> Outcome:
        if not outcome.changed:
            return outcome
        if self._server_runs():
            self._say("restart", "the server finishes its requests and starts again with the new model")
        restart = restart_server(self.home, outcome.bundle_id, self.config.install.restart_timeout_s)
        self._say("restart", restart.message)
        return replace(outcome, restart=restart)

    def _server_runs(self) -> bool:
        return self.layout.serve_pid.exists()

    def _log_refusal(self, directory: Path, error: SolocardError) -> None:
        """Nothing was changed, so the refusal itself is what a person must see, even when the journal is full."""
        try:
            self._journal.append("refused", source=str(directory), error=str(error)[-1000:])
        except StoreError as unlogged:
            self._say("journal", str(unlogged))

    def _raise_floors(self, manifest: Manifest, chain: Chain) -> Floors:
        floors = Floors.read(self.home) or Floors()
        raised = floors.raised(
            timestamp_version=chain.timestamp_version, snapshot_version=chain.snapshot_version,
            targets_version=chain.targets_version, release_counter=manifest.release_counter,
            security_counter=chain.min_secure_counter, time_s=int(utc_now().timestamp()),
        )  # fmt: skip
        behind = replace(raised, time_s=floors.time_s) != floors
        return raised.write(self.home) if behind else floors

    def _recover(self) -> Floors:
        """Finish what a killed process left: a partial copy, a trial under way, floors below the current model's."""
        self._pool.clear_partial()
        state = self._state_or_empty()
        if state.trial:
            self._journal.append("recovered", trial=state.trial)
            replace(state, trial="").write(self.home)
        floors = Floors.read(self.home) or Floors()
        if floors.root_version and state.current:
            try:
                chain = stored_chain(self.layout, state.current)
                floors = self._raise_floors(self._pool.manifest(state.current), chain)
            except (BundleError, StoreError) as error:
                self._journal.append("damaged", bundle_id=state.current, error=str(error))
        return floors

    def _state_or_empty(self) -> State:
        """The state; an empty one when its file is damaged, so that `activate` can write it anew."""
        try:
            return State.read(self.home)
        except StoreError as error:
            self._journal.append("damaged", error=str(error))
            return State()

    def _say(self, step: str, message: str, **data: Any) -> None:
        elapsed_s = round(time.monotonic() - self._start, 3)
        self._report(Progress(step, message, elapsed_s=elapsed_s, data=data))


def _check_versions(chain: Chain, floors: Floors) -> None:
    for role, file in (("timestamp", "timestamp.json"), ("snapshot", f"{chain.snapshot_version}.snapshot.json"),
                       ("targets", f"{chain.targets_version}.targets.json")):  # fmt: skip
        found, floor = getattr(chain, f"{role}_version"), getattr(floors, f"{role}_version")
        if found < floor:
            raise TrustError(
                f"metadata/{file} is version {found}, older than version {floor} seen here before: an older release; "
                "`solocard rollback` goes back to an installed one"
            )


def _versions(chain: Chain) -> dict[str, int]:
    return {
        "root": chain.root_version, "timestamp": chain.timestamp_version, "snapshot": chain.snapshot_version,
        "targets": chain.targets_version,
    }  # fmt: skip
