# Says what to install when Java is missing or of a version that Spark 4.2 does not run on.
java=${JAVA_HOME:+$JAVA_HOME/bin/}java
hint="Install Java 17 or 21 (Debian, Ubuntu: sudo apt install openjdk-17-jre-headless; macOS: brew install openjdk@17), or point JAVA_HOME at one."
if ! said=$("$java" -version 2>&1); then
  echo "Java does not run ($java). Spark cannot start without it. $hint"
  exit 1
fi
version=$(printf '%s\n' "$said" | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
case "$version" in
  17 | 21) ;;
  *)
    echo "Java ${version:-of an unknown version} is here, Spark 4.2 needs 17 or 21. $hint"
    exit 1
    ;;
esac
