# Every script sources this file first, with its arguments. Where --help or -h is
# among them, the comment at the script's head is printed, after it that of the
# file that sources this one (scripts/common.sh has what all experiments read)
# and a line on paths, and nothing else happens. A file that is only sourced
# prints its head when it is run.
[ "${BASH_SOURCE[0]}" != "$0" ] || set -- --help

# print_head FILE: the comment that FILE begins with
print_head() {
    local line
    while IFS= read -r line && [[ $line == "#"* ]]; do
        [[ $line == "#!"* ]] || { line=${line#"#"} && echo "${line# }"; }
    done < "$1"
}

for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        print_head "$0"
        if [ "${BASH_SOURCE[1]:-$0}" != "$0" ]; then
            echo
            print_head "${BASH_SOURCE[1]}"
        fi
        echo
        echo "Relative paths begin at the project's folder, wherever a script is started."
        exit
    fi
done
