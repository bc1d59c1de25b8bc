# Sourced, and not run by itself: passes signals on to what a script runs. bash
# handles a signal only when its foreground command has ended, so `run` starts
# commands in the background and waits. They get SIGTERM whatever the signal was,
# since most programs end at SIGUSR1 (Slurm's warning of the time limit), and
# background commands of a script ignore SIGINT.
[ "${BASH_SOURCE[0]}" != "$0" ] || source "$(dirname "$0")/help.sh" --help
UNFINISHED=75 # exit status of a command that was stopped, and goes on when it is started again (EX_TEMPFAIL)
forwarded=TERM
stopped=   # the first signal

forward_signals() {
    local signal
    for signal in USR1 TERM INT HUP; do
        # shellcheck disable=SC2064 # only $signal is expanded now
        trap "stopped=\${stopped:-$signal}; kill -\$forwarded \$(jobs -rp) 2> /dev/null || true" "$signal"
    done
}

# go_on_later: ends a script that was stopped with that exit status, whatever its last command had
go_on_later() {
    [ -z "$stopped" ] || {
        echo "stopped: the same command goes on" >&2
        exit "$UNFINISHED"
    }
}

# run COMMAND...: returns its exit status. After a signal, nothing is started any more.
run() {
    [ -z "$stopped" ] || return $UNFINISHED
    "$@" &
    while kill -0 $! 2> /dev/null; do wait $! || true; done # a signal ends `wait` early
    wait $! || wait $! # the first one, too, if the signal comes now
}
