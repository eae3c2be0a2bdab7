"""What a program would need and do on TPUs, from compiling it for them on any machine."""
