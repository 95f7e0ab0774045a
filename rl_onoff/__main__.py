from rl_onoff.cli.main import main

main()
