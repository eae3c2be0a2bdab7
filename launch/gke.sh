#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: as an xpk workload, or with --jobset as a JobSet through kubectl.
# Usage: bash launch/gke.sh [OPTIONS] NAME CLUSTER ZONE TYPE IMAGE --config=experiments/llada_8b.py --workdir=/shared/run [flags ...]
# TYPE is generation:topology as in llada plan (v5p:4x4x8, v6e:16x16), IMAGE a container with llada and jax[tpu]
# (launch/Dockerfile). OPTIONS: --dry_run prints and calls nothing; --slices=N; --spot; --restarts=N; --project=P;
# --storage=NAME:DIR holds the workdir: a storage that xpk has attached at DIR, or a volume claim to mount there.
# A preempted or crashed run is restarted on all hosts from its checkpoint, up to --restarts times, except where it would
# fail again (status 2 a mistake, 3 diverged, 4 its data).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
print_help "$@"
jobset="" spot="" slices=1 restarts=100 project="" storage=""
take_options "dry_run jobset spot" "slices restarts project storage" "$@"
set -- ${words[@]+"${words[@]}"}
[ $# -ge 5 ] || refuse "usage: bash launch/gke.sh [OPTIONS] NAME CLUSTER ZONE TYPE IMAGE --config=... --workdir=..."
name="$1" cluster="$2" zone="$3" type="$4" image="$5"
shift 5
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] || refuse "NAME $name must be a-z, 0-9 and -, 28 characters at most"
size="([1-9][0-9]{0,4})"
[[ "$type" =~ ^(v4|v5e|v5p|v6e|tpu7x):${size}x${size}(x${size})?$ ]] ||
  refuse "TYPE $type must be GENERATION:TOPOLOGY, with v4, v5e, v5p, v6e or tpu7x, like v5p:4x4x8"
generation="${type%%:*}" topology="${type#*:}"
a="${BASH_REMATCH[2]}" b="${BASH_REMATCH[3]}" c="${BASH_REMATCH[5]:-1}"
chips=$((a * b * c))
# The slice shapes that exist, as in src/llada/planning/topology.py.
case "$generation" in
  v5e | v6e) slice_shapes="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" largest=0 ;;
  v4) slice_shapes="2x2x1 2x2x2 2x2x4 2x4x4" largest=4096 ;;
  v5p) slice_shapes="2x2x1 2x2x2 2x2x4 2x4x4" largest=8960 ;;
  tpu7x) slice_shapes="2x2x1 2x2x2 2x2x4 2x4x4" largest=9216 ;;
esac
if [[ " $slice_shapes " != *" $topology "* ]] && {
  [ "$chips" -gt "$largest" ] || [ "$a" -gt "$b" ] || [ "$b" -gt "$c" ] || [ $((a % 4 + b % 4 + c % 4)) -ne 0 ]
}; then
  [ "$largest" -eq 0 ] || slice_shapes+=", or AxBxC with A <= B <= C, all multiples of 4, up to $largest chips"
  refuse "TYPE $type: $generation slices are $slice_shapes"
fi
for number in "slices=$slices" "restarts=$restarts"; do
  [[ "$number" =~ =[1-9][0-9]*$ ]] || refuse "--$number must be a number from 1 on"
done
[ -z "$storage" ] || [[ "$storage" =~ ^[-a-z0-9.]+:/.+ ]] || refuse "--storage=$storage must be NAME:/DIR"
read_training "$@"
check_experiment
check_flags "$@"

# Slices of several hosts have four chips on each.
hosts=$(((chips + 3) / 4))
chips_a_host=$((chips < 4 ? chips : 4))
[ $((hosts * chips_a_host)) -eq "$chips" ] || refuse "TYPE $type has $chips chips: not a whole number of hosts of four"

run_xpk() {
  local prefix="$generation"
  [ "$generation" != v5e ] || prefix=v5litepod
  # exec: signals reach llada, which then saves. Restarted after these and those above 126, which xpk adds.
  run xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$prefix-$topology" \
    --num-slices="$slices" --docker-image="$image" --command="exec llada train $(shell_quoted "$@")" \
    --max-restarts="$restarts" --restart-on-exit-codes=1,"$disk,$peer" --termination-grace-period-seconds=120 \
    ${spot:+--spot} ${project:+--project="$project"} ${storage:+--storage="${storage%%:*}"}
}

# A YAML string in double quotes, escaped as in JSON.
quoted() {
  local text="${1//\\/\\\\}"
  text="${text//\"/\\\"}"
  text="${text//$'\n'/\\n}"
  printf '"%s"' "${text//$'\t'/\\t}"
}

render_jobset() {
  local accelerator word arguments=""
  case "$generation" in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    tpu7x) accelerator=tpu7x ;;
  esac
  for word in llada train "$@"; do arguments+="${arguments:+, }$(quoted "$word")"; done
  cat << YAML
# One Job per slice, one Pod per host. A failed Pod restarts all, up to maxRestarts, unless it would fail again.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: llada, operator: In, values: [$(printf '%s, ' "${final_statuses[@]}" | sed 's/, $//')]}
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
${spot:+                cloud.google.com/gke-spot: \"true\"
}              containers:
                - name: llada
                  image: $(quoted "$image")
                  command: [$arguments]
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits: {google.com/tpu: $chips_a_host}
YAML
  if [ -n "$storage" ]; then
    cat << YAML
                  volumeMounts:
                    - {name: shared, mountPath: $(quoted "${storage#*:}")}
              volumes:
                - name: shared
                  persistentVolumeClaim: {claimName: ${storage%%:*}}
YAML
  fi
}

if [ -z "$jobset" ]; then
  run_xpk "$@"
  exit
fi
file=$(mktemp -t jobset.XXXXXX.yaml)
trap 'rm -f "$file"' EXIT
render_jobset "$@" | tee "$file"
echo "---"
run gcloud container clusters get-credentials "$cluster" --location="$zone" ${project:+--project="$project"}
run kubectl apply --filename="$file"
echo "# to follow its log (Ctrl-C leaves it running), and to delete it:"
show kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
show kubectl delete jobset "$name"
