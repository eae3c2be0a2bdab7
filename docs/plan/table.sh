cd /tmp/s/wt; export PYTHONPATH=/tmp/s/wt/src:/work/main/.venv/tpu
P="python benchmarks/plan_table.py"
$P --models=llada_8b --topologies=v5p:4x4x8 --remat=dots
$P --models=llada_8b --topologies=v6e:16x16
$P --models=llada_8b --topologies=tpu7x:4x4x4 --remat=dots
$P --models=llada_8b --topologies=v5e:16x16,v4:4x4x4
$P --models=llada_1b --topologies=v5p:4x4x8,tpu7x:4x4x4,v6e:16x16 --remat=dots
$P --models=llada_1b --topologies=v5e:16x16,v4:4x4x4
$P --models=arm_7b,arm_1b --topologies=v5p:4x4x8 --remat=dots
