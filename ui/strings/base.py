"""Every sentence the console shows, as one frozen object per language. ``{}`` fields are filled by ``str.format``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Strings:
    """Grouped by screen; each language module fills every field."""

    title: str
    replay_mark: str
    too_small: str
    too_small_hint: str

    # what the server is doing, in the title line
    state_asking: str
    state_up: str
    state_down: str
    state_unreadable: str
    state_starting: str
    state_ready: str
    state_draining: str

    # actions: name on the key line, and what it does in the help
    overview: str
    overview_help: str
    models: str
    models_help: str
    logs: str
    logs_help: str
    cache: str
    cache_help: str
    help: str
    help_help: str
    palette: str
    palette_help: str
    quit: str
    quit_help: str
    activate: str
    activate_help: str
    rollback: str
    rollback_help: str
    reload: str
    reload_help: str
    filter: str
    filter_help: str
    follow: str
    follow_help: str
    purge: str
    purge_help: str
    verify: str
    verify_help: str
    renew: str
    renew_help: str

    # overview
    model: str
    bundle: str
    device: str
    backend: str
    encoding: str
    encoding_line: str
    uptime: str
    context: str
    tokens: str
    rates_title: str
    prefill: str
    decode: str
    rate_unit: str
    peak: str
    requests: str
    requests_line: str
    tokens_line: str
    kv_title: str
    kv_disk: str
    kv_disk_caption: str
    kv_hits: str
    kv_hits_caption: str
    kv_none_yet: str
    kv_off: str
    kv_writing: str
    kv_stopped: str
    kv_missed: str
    notes_title: str
    notes_none: str
    notes_more: str
    asking_title: str
    asking_body: str
    down_title: str
    down_body: str
    unreadable_title: str
    unreadable_body: str

    # models
    models_title: str
    column_bundle: str
    column_version: str
    column_release: str
    column_size: str
    column_state: str
    in_service: str
    previous: str
    on_trial: str
    models_loading: str
    models_empty: str
    models_failed: str
    serving_differs: str
    command_title: str
    command_running: str
    command_ok: str
    command_failed: str
    command_broken: str
    command_stopped: str
    command_none: str
    busy: str
    already_in_service: str
    nothing_previous: str
    nothing_selected: str

    # typed confirmation
    activate_title: str
    rollback_title: str
    change_from: str
    change_to: str
    change_nothing: str
    bundle_line: str
    older_release: str
    downtime: str
    command_label: str
    undo_label: str
    undo_none: str
    type_to_confirm: str
    typed_wrong: str
    typed_right: str
    cancel: str
    cancelled: str

    # logs
    logs_title: str
    logs_filtered: str
    logs_following: str
    logs_paused: str
    logs_empty: str
    logs_no_match: str
    logs_down: str
    logs_replay: str
    filter_prompt: str

    # KV cache
    cache_loading: str
    cache_failed: str
    cache_replay: str
    cache_down: str
    cache_logged: str
    cache_none_logged: str
    cache_today: str
    cache_written: str
    cache_written_of: str
    cache_holds: str
    cache_holds_line: str
    cache_damaged: str
    cache_purged: str
    reasons_title: str
    reasons_title_of: str
    reasons_none: str
    reasons_more: str
    reason_too_short: str
    reason_no_unit: str
    reason_fingerprint: str
    reason_ttl: str
    reason_evicted: str
    reason_corrupt: str
    reason_policy: str
    reason_unknown: str
    misses_title: str
    miss_line: str
    tenants_title: str
    tenants_none: str
    column_tenant: str
    column_blocks: str
    column_units: str
    column_used: str
    never: str
    ago: str
    just_now: str
    purge_title: str
    purge_what: str
    purge_warning: str
    purge_undo: str
    tenant_line: str
    type_tenant: str

    # help and palette
    help_title: str
    help_everywhere: str
    palette_title: str
    palette_no_match: str
    moving: str
    moving_help: str
